"""`python -m dtrain.checkpoints.torch_file FILE`: a file of `torch.save` with empty space.

It is a process of its own, because it imports torch. It uses no memory for the tensors: memory that
nobody writes to is not there, and torch leaves out their bytes.
"""

from __future__ import annotations

import json
import sys

import torch


def main() -> None:
    """Write the file for the request in stdin: types and shapes of tensors, and their names."""
    request = json.load(sys.stdin)
    tensors = [
        torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in request["tensors"]
    ]
    # several names of one tensor share its memory again when the file is loaded
    state = {name: tensors[index] for name, index in request["names"].items()}
    with torch.serialization.skip_data():
        torch.save(state, sys.argv[1])


if __name__ == "__main__":
    main()
