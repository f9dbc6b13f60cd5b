"""Sweeps: runs of one job that differ in the values of some fields."""
