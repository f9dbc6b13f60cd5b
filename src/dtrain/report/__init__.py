"""What `dtrain report` shows: the whole course of one or several runs."""
