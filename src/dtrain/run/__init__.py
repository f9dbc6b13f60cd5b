"""A run: its directory, attempts, events, failures, verdict and permanent copy."""
