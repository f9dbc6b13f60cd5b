"""Whose loop runs."""
