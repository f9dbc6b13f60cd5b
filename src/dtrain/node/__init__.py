"""On a node: the agent, the bootstrap of a worker, failure records and the verdict."""
