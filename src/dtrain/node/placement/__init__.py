"""Placement: which node this is and where the others are, with one reader per kind of cluster."""
