"""Who a node is and where the others are: one reader for each kind of cluster."""
