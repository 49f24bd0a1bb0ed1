"""The report: what the files of results hold, as one page of HTML that needs nothing else, and in a document."""
