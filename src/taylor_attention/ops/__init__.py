"""Computing attention: the public functional API, its specification and its implementations."""
