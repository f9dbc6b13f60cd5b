"""Strategy `exact`: virtual shards, whose gradients are added in one fixed tree."""
