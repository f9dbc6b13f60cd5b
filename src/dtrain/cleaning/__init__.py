"""Removing what is no longer needed: leftovers, checkpoints that are not kept, and whole runs."""
