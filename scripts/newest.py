"""What `make test-newest` has to run: the tests to give to pytest on stdout, the reason on stderr.

the ranges of pyproject.toml, today        the pins of constraints.txt
transformers 5.25.0, peft 0.21.2, ...      transformers 5.24.0, peft 0.21.2, ...

something differs     the whole suite: a release that nobody here has seen
nothing differs       `make test` was that run; only the names that we use are looked up once more
"""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).resolve().parents[1]
QUICK = ("tests/project/test_api_drift.py", "tests/thuglm/test_model_behaviour.py")
"""Looks up every name of other packages that we use."""


def newer_than_pinned(project: Path = PROJECT) -> list[str]:
    """The packages of pyproject.toml whose installed version is another than the pinned one, as "name old -> new"."""
    lines = (project / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }
    settings = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    extras = settings["optional-dependencies"]
    needs = [*settings["dependencies"], *extras["notebooks"], *extras["scores"]]
    names = [canonicalize_name(Requirement(need).name) for need in needs]
    found = {name: (Version(pins[name]), Version(metadata.version(name))) for name in names if name != "torch"}
    return [f"{name} {old} -> {new}" for name, (old, new) in found.items() if old != new]


if __name__ == "__main__":
    different = newer_than_pinned()
    if different:
        print(f"Newer than constraints.txt: {', '.join(different)}. The suite runs on them.", file=sys.stderr)
        print(" ".join(sys.argv[1:]) or "tests")
    else:
        print("Nothing of pyproject.toml is newer than constraints.txt: `make test` was this run.", file=sys.stderr)
        print(" ".join(sys.argv[1:] or QUICK))
