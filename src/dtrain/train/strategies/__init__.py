"""How processes share the work of one step."""
