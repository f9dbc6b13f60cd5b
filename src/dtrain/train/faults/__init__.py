"""Faults made on purpose, to see whether the checks find them."""
