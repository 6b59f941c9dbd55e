"""The peers' tests are run from build/peers by `make test-peers`, and collected by nobody else.

What `does_not_apply.toml` names is skipped, with the reason that stands there; a name there that no test has is an error,
so that the list stays short.
"""

import os
import sys
import tomllib
import types
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "peers"


def stand_in(name: str, **members) -> None:
    """A module that the peers' tests import and that is not there."""
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


if "GLM_PEERS" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path += map(str, [FOLDER, *FOLDER.glob("lib/*/site-packages")])
    # The archive of transformers holds the files of tests/ alone, none of its folders.
    for folder in ("exporters", "generation", "utils"):
        stand_in(f"transformers_tests.{folder}")
    stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=object)
    stand_in("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    common = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "dtype": "float16"}
    stand_in("transformers_tests.utils.test_configuration_utils", config_common_kwargs=common)
    # peft's tests ask whether a model is one of those.
    stand_in("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))


def reasons() -> dict[str, str]:
    """Test -> why it does not apply to this model."""
    tables = tomllib.loads((HERE / "does_not_apply.toml").read_text("utf-8"))
    return {f"{file}::{test}": why for file, tests in tables.items() for test, why in tests.items()}


def matches(name: str, item: pytest.Item) -> bool:
    """Whether `name` is this test: "file::test", where parts of a parametrized test's brackets may follow it."""
    file, test, *parts = name.replace("[", "::").rstrip("]").split("::")
    function = getattr(item, "originalname", None) or item.name
    full = item.name
    return item.path.stem == file and test in ("*", function, full) and all(part in full for part in parts)


def pytest_collection_modifyitems(config, items):
    named, used = reasons(), set()
    for item in items:
        for name, why in named.items():
            if matches(name, item):
                used.add(name)
                if "GLM_PEERS_ALL" not in os.environ:
                    item.add_marker(pytest.mark.skip(reason=why))
    files = {item.path.stem for item in items}
    if not config.option.keyword and (stale := [n for n in named if n not in used and n.split("::")[0] in files]):
        raise pytest.UsageError(f"does_not_apply.toml names tests that are not there: {', '.join(stale)}")
