"""The evaluation set is padded to equal shares: some samples count twice."""

from dtrain.train.data import loader

loader.shard = lambda n, rank, size: range(
    n - -(-n // size) if rank == size - 1 else rank * -(-n // size),
    n if rank == size - 1 else (rank + 1) * -(-n // size),
)
