"""Console output: lines of many ranks folded into few, and the progress of a launch."""
