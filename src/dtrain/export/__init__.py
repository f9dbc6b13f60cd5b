"""A trained model in a form that other programs read, with a proof that it is the same model."""
