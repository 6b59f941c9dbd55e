"""The script that makes the virtual environment: which Python it takes, what it says, and that it installs once."""

import os
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def fake_python(folder, name, version):
    """An interpreter that only knows its version; `-m venv FOLDER` puts itself there, pip calls are recorded."""
    newer = 0 if version >= (3, 11) else 1
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -V ]; then echo "Python {version[0]}.{version[1]}"; exit 0; fi\n'
        f'if [ "$1" = -c ]; then exit {newer}; fi\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
        'if [ "$2 $3" = "pip install" ]; then echo "$*" >>"$CALLS"; fi\n'
    )
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("Makefile", "scripts/make_venv.sh", "pyproject.toml", "constraints.txt", "constraints-oldest.txt"):
        (tmp_path / name).write_text((PROJECT / name).read_text())
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "make", "rm", "touch", "mkdir", "cp"):
        found = next(Path(at) / name for at in ("/bin", "/usr/bin") if (Path(at) / name).exists())
        (tools / name).symlink_to(found)
    return tmp_path


def make(folder, *arguments, **environment):
    environment = {"PATH": str(folder / "tools"), "CALLS": str(folder / "calls"), **environment}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def pip_calls(folder):
    calls = folder / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_installs_pins_and_project_once(folder):
    fake_python(folder / "tools", "python3", (3, 12))
    done = make(folder, ".venv/.installed")
    assert done.returncode == 0, done.stderr
    assert "Making .venv with Python 3.12 from constraints.txt" in done.stdout
    calls = pip_calls(folder)
    assert len(calls) == 2
    assert all("-c constraints.txt" in call for call in calls)
    assert calls[1].endswith("-e .[notebooks,scores,test]")
    make(folder, ".venv/.installed")
    assert pip_calls(folder) == calls, "a second run must install nothing"


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_the_pins_brings_the_folder_up_to_date(folder, changed):
    fake_python(folder / "tools", "python3", (3, 12))
    make(folder, ".venv/.installed")
    kept = folder / ".venv" / "kept"
    kept.touch()
    stamp = folder / ".venv" / ".installed"
    later = stamp.stat().st_mtime + 5
    os.utime(folder / changed, (later, later))
    done = make(folder, ".venv/.installed")
    assert "Bringing .venv to the versions" in done.stdout
    assert len(pip_calls(folder)) == 4
    assert kept.exists()


def test_oldest_set_has_a_folder_of_its_own(folder):
    fake_python(folder / "tools", "python3", (3, 11))
    make(folder, ".venv-oldest/.installed")
    assert all("-c constraints-oldest.txt" in call for call in pip_calls(folder))
    assert (folder / ".venv-oldest" / ".installed").exists()
    assert not (folder / ".venv").exists()


def test_takes_a_newer_python_where_python3_is_old(folder):
    fake_python(folder / "tools", "python3", (3, 9))
    fake_python(folder / "tools", "python3.11", (3, 11))
    assert "Making .venv with Python 3.11" in make(folder, ".venv/.installed").stdout


@pytest.mark.parametrize("arguments", [(), ("PYTHON=python3",)])
def test_an_old_python_is_refused_by_name(folder, arguments):
    fake_python(folder / "tools", "python3", (3, 9))
    done = make(folder, ".venv/.installed", *arguments)
    assert done.returncode != 0
    assert "Python 3.9" in done.stderr
    assert "3.11" in done.stderr
    assert not (folder / ".venv").exists()


def test_no_python_at_all_is_said(folder):
    done = make(folder, ".venv/.installed")
    assert done.returncode != 0
    assert "No Python 3.11 or newer on the PATH" in done.stderr
