"""Traces of runs, which record what each step did, for `dtrain verify`."""
