"""Scripts with their own training loop: how they run, and the parts of dtrain for them."""
