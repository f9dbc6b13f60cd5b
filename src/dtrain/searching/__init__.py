"""Finding runs among many: what is known of each, which match, and in which order."""
