"""A run seen in a browser: the live page, and the report in one file; no torch."""
