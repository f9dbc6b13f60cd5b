"""What each step of a traced run did, for dtrain verify."""
