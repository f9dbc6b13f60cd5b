"""All ranks seed their random numbers alike."""

from dtrain.train.trainers import saving

_seed = saving.derive_seed


def without_rank(*parts):
    return _seed("train", 0) if parts[0] == "train" else _seed(*parts)


saving.derive_seed = without_rank
