"""Bring the tests of transformers and peft: `python tests/peers/fetch.py FOLDER`.

They come with the source archives of the versions that this environment has, are run from FOLDER, and are no part of
this repository:

    registry ──► transformers-X.tar.gz ──► FOLDER/transformers_tests/   tests/*.py, the common ones
             ──► peft-Y.tar.gz         ──► FOLDER/peft_tests/           tests/*.py, all of them
             ──► lm-eval, parameterized ─► FOLDER/lib/                  what they and test_lm_eval.py import
"""

import importlib.metadata
import subprocess
import sys
import tarfile
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PEERS = ("transformers", "peft")
OTHERS = ("lm-eval==0.4.13", "parameterized==0.9.0")


def pip(*arguments: str) -> None:
    """Run pip, which says itself what went wrong."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode:
        sys.exit("The package registry did not give what the peers' tests need (see above): they cannot run here.")


def fetch(name: str, folder: Path) -> None:
    """Unpack the tests of package `name` into `folder`/NAME_tests, unless those of this version are there."""
    archive = folder / f"{name}-{importlib.metadata.version(name)}.tar.gz"
    tests = folder / f"{name}_tests"
    if archive.exists() and (tests / "__init__.py").exists():
        return
    wanted = f"{name}=={importlib.metadata.version(name)}"
    pip("download", "--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", str(folder), wanted)
    tests.mkdir(exist_ok=True)
    with tarfile.open(archive) as packed:
        for member in packed:
            path = Path(member.name)
            if len(path.parts) == 3 and path.parts[1] == "tests" and path.suffix == ".py" and member.isfile():
                (tests / path.name).write_bytes(packed.extractfile(member).read())
    (tests / "__init__.py").touch()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in PEERS:
        fetch(name, folder)
    # What this environment has stays as it is; the rest goes beside it.
    if not list(folder.glob("lib/*/site-packages/lm_eval")):
        pip("install", "--prefix", str(folder), "--constraint", str(CONSTRAINTS), *OTHERS)
