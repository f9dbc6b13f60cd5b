"""The strategies: how processes share the work of one step."""
