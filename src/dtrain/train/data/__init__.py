"""The data of a training: the order of samples, their placement on ranks, and their loading.

For data sets: `sample_rng` and `sample_seed` return random numbers that belong to the sample being
read. They are the same for any number of processes.
"""

from dtrain.train.data.augmentation import sample_rng, sample_seed

__all__ = ["sample_rng", "sample_seed"]
