"""The processes on a node: the fork server, the agents and their rendezvous, and the workers."""
