"""Which sample, when, on which rank; and how it gets there.

For data sets: `sample_rng` and `sample_seed` give random numbers that belong to the sample being
read, the same on any number of processes.
"""

from dtrain.train.data.augmentation import sample_rng, sample_seed

__all__ = ["sample_rng", "sample_seed"]
