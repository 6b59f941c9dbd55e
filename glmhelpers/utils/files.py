"""Files appear whole or not at all.

with whole_file(path) as unfinished:      path.PID.tmp   <- written here
    unfinished.write_text(...)                |
                                              +- no error: os.replace -> path
                                              +- an error: removed, an older `path` stays as it was
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and renames it to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
