"""Lightning's own loops, with dtrain's samples, checks and checkpoints around them."""
