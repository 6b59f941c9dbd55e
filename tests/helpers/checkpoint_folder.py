"""A folder with the golden checkpoint and its tokenizer, which a test may change."""

from pathlib import Path

import torch

REFERENCE = Path(__file__).resolve().parents[1] / "reference"


FIRST, SECOND, LAST = (f"pytorch_model-0000{number}-of-00008.bin" for number in (1, 2, 8))


def edit_shard(path: Path, **changes) -> None:
    tensors = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in (tensors | changes).items() if value is not None}, path)
