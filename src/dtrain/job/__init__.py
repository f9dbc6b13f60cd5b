"""The description of a training: the job file, its models, and the profiles of machines."""
