"""`dtrain bench`: how fast the parts of a training are on the nodes of a launch."""
