"""The commands of `dtrain checkpoint`."""
