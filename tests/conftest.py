"""What several test files share: checkpoints that take a moment to make are made once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def grown(tmp_path_factory) -> Path:
    """The tiny checkpoint grown to 512 wide and 12 blocks: real weights for whoever is told that it is one."""
    from grow_checkpoint import grow

    source = Path(__file__).resolve().parents[1] / "data" / "tiny-chatglm"
    return grow(source, tmp_path_factory.mktemp("grown") / "chatglm", 512, 8, 12, vocab_size=2528)
