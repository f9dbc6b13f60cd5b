"""Never lose, never load rubbish."""
