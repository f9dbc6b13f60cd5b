"""Seeds that do not collide, and the state of all global random generators of the process."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed, which is a hash of a sequence of numbers and words.

    Sums collide (in torch's DistributedSampler, seed 1 epoch 1 is seed 2 epoch 0). Hashes of the
    spelled-out parts do not.
    """
    spelled = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(spelled.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (CPU, and CUDA when in use)."""
    random.seed(seed)
    # NumPy gets another seed than torch: both use the Mersenne Twister and seed it from 32 bits in
    # the same way, so they would draw the same words.
    np.random.seed(derive_seed("numpy", seed) % 2**32)
    seed_torch(seed)


def seed_torch(seed: int) -> None:
    """Seed torch's global generators, on the CPU and on GPUs in use.

    `torch.manual_seed` is not used: without CUDA it formats a stack for a lazy call, which takes
    50 µs to 3 ms.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@dataclass(frozen=True)
class RandomState:
    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: torch.Tensor
    cuda: list[torch.Tensor] | None
    """The state of each device; None if CUDA is not in use."""

    @classmethod
    def capture(cls) -> RandomState:
        """Return the current state. It takes about 15 µs."""
        numpy_state: Any = np.random.get_state(legacy=False)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        return cls(random.getstate(), numpy_state, torch.get_rng_state(), cuda)

    def unchanged(self) -> bool:
        """Return whether nothing was drawn from the CPU generators since this state."""
        now: Any = np.random.get_state(legacy=False)
        return (
            torch.equal(self.torch, torch.get_rng_state())
            and self.numpy["state"]["pos"] == now["state"]["pos"]
            and np.array_equal(self.numpy["state"]["key"], now["state"]["key"])
            and self.python == random.getstate()
        )

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None and torch.cuda.is_initialized():
            for device, state in enumerate(self.cuda[: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)

    def to_saved(self) -> dict[str, Any]:
        """Return tensors, numbers and lists only, which `torch.load(weights_only=True)` reads."""
        version, words, gauss = self.python
        inner = self.numpy["state"]
        return {
            "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
            "numpy": {
                "bit_generator": str(self.numpy["bit_generator"]),
                "key": torch.from_numpy(inner["key"].astype(np.int64)),
                "pos": int(inner["pos"]),
                "has_gauss": int(self.numpy["has_gauss"]),
                "gauss": float(self.numpy["gauss"]),
            },
            "torch": self.torch,
            "cuda": self.cuda,
        }

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> RandomState:
        version, words, gauss = saved["python"]
        numpy_state = dict(saved["numpy"])
        key = numpy_state.pop("key").numpy().astype(np.uint32)
        numpy_state["state"] = {"key": key, "pos": numpy_state.pop("pos")}
        python = (version, tuple(words.tolist()), gauss)
        return cls(python, numpy_state, saved["torch"], saved["cuda"])
