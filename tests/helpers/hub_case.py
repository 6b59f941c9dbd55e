"""What the tests of `download_weights` share: a hub with the reference checkpoint, and what must hold afterwards."""

import hashlib
import json
import shutil
import time
import types
from pathlib import Path

import pytest

import glmhelpers.weights.hub
from glmhelpers.weights.download import download_weights
from tests.helpers.hub_server import Hub

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
LARGE = "pytorch_model-00001-of-00008.bin"
CHUNK = 65536


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """What the hub has: the reference checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    for path in [*(REFERENCE / "checkpoint").iterdir(), *(REFERENCE / "tokenizer").iterdir()]:
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def hub(published, monkeypatch):
    # Nobody wants to wait between retries.
    asleep = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(glmhelpers.weights.hub, "time", asleep)
    with Hub(published) as hub:
        yield hub


def manifest_of(hub: Hub) -> dict:
    config = json.loads((hub.folder / "config.json").read_text())
    tokenizer_config = json.loads((hub.folder / "tokenizer_config.json").read_text())
    return hub.manifest(config=config, tokenizer_config=tokenizer_config)


def fetch(hub: Hub, folder: Path, **more):
    return download_weights(folder, manifest=manifest_of(hub), endpoint=hub.url, progress=False, **more)


def assert_bit_exact(hub: Hub, folder: Path) -> None:
    for name in manifest_of(hub)["files"]:
        assert (folder / name).read_bytes() == (hub.folder / name).read_bytes(), name
    assert not list(folder.glob("*.part"))


def assert_no_wrong_file(hub: Hub, folder: Path) -> None:
    for name, facts in manifest_of(hub)["files"].items():
        if (folder / name).exists():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"], name
