"""Strategy exact: virtual shards added up in one fixed tree."""
