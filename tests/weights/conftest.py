"""Fixtures of the tests on weights."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.checkpoint_folder import REFERENCE


@pytest.fixture
def folder(tmp_path) -> Path:
    """The golden checkpoint and its tokenizer in a folder of its own, which may be changed."""
    target = tmp_path / "thuglm"
    target.mkdir()
    for path in [*(REFERENCE / "checkpoint").iterdir(), *(REFERENCE / "tokenizer").iterdir()]:
        shutil.copy(path, target / path.name)
        (target / path.name).chmod(0o644)
    return target
