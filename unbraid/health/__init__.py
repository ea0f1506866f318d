"""What is wrong with a run, from its records alone; no torch."""
