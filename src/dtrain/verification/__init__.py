"""`dtrain verify`: runs a job under every strategy, trainer and launcher, and compares."""
