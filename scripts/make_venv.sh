#!/bin/sh
# make_venv.sh FOLDER CONSTRAINTS [--upgrade]: a virtual environment with the project (editable) and exactly the pinned
# packages. A folder that is there already is brought up to date; with --upgrade, what is not pinned becomes the newest
# that the ranges of pyproject.toml allow today. $PYTHON chooses the interpreter; without it, the first of
# python3, python3.13, python3.12, python3.11 that is 3.11 or newer.
set -eu
folder=$1
constraints=$2
upgrade=${3:+--upgrade --upgrade-strategy=eager}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    if ! new_enough "$PYTHON"; then
        echo "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1 || echo 'not there'); Python 3.11 or newer is needed." >&2
        exit 1
    fi
else
    for PYTHON in python3 python3.13 python3.12 python3.11 none; do
        new_enough "$PYTHON" && break
    done
    if [ "$PYTHON" = none ]; then
        echo "No Python 3.11 or newer on the PATH (python3 is $(python3 -V 2>&1 || echo 'not there'))." >&2
        echo "Install one, or name it: make PYTHON=/path/to/python3.12 tutorial" >&2
        exit 1
    fi
fi

if new_enough "$folder/bin/python" && "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "Bringing $folder to the versions of $constraints."
else
    echo "Making $folder with $("$PYTHON" -V) from $constraints (some minutes, once)."
    rm -rf "$folder"
    if ! "$PYTHON" -m venv "$folder"; then
        echo "python -m venv failed; on Debian and Ubuntu it comes with the package python3-venv." >&2
        exit 1
    fi
fi
# setuptools is pinned too, and the build may not fetch another one: hence the two steps.
# shellcheck disable=SC2086 # no words, or two
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check $upgrade -c "$constraints" "setuptools>=77"
# shellcheck disable=SC2086
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check $upgrade -c "$constraints" \
    --no-build-isolation -e ".[notebooks,scores,test]"
touch "$folder/.installed"
