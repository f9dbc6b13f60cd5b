"""Comparing runs: what differs in job, code, environment, data and metrics, and from which step."""
