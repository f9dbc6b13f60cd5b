"""What is trained: the job file, its models, and the profiles of the places it can run."""
