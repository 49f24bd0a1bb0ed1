"""The evidence: experiments on the method, each with its results in one small file, its tables and its pictures."""
