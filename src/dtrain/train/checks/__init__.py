"""Are the replicas still one model? Comparisons before, during and between steps."""
