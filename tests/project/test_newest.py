"""What `make test-newest` runs."""

from importlib import metadata

import newest
from newest import PROJECT, QUICK, newer_than_pinned


def test_the_quick_tests_are_there():
    assert all((PROJECT / path).is_file() for path in QUICK)


def test_every_package_has_a_pin_and_a_newer_one_is_named(monkeypatch):
    installed = metadata.version
    monkeypatch.setattr(newest.metadata, "version", lambda name: "999.0" if name == "peft" else installed(name))
    found = newer_than_pinned()
    assert any(line.startswith("peft ") and line.endswith("-> 999.0") for line in found)
