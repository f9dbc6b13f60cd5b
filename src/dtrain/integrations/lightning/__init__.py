"""Lightning's loop, hooks, callbacks and loggers around dtrain's step."""
