"""Launcher ray: one actor on each node of a Ray cluster, and below it one node agent."""
