"""Runs in the browser: the live dashboard, and the report in one file. Nothing here imports torch."""
