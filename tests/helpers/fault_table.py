"""The table of faults in notebook 01, made by the tests that cause them.

Each test calls `check_row`. It writes the row to build/fault_table.json, and compares it with the committed
notebooks/assets/fault_table.json. To renew that file after a change of words:

    GLM_RENEW_FAULT_TABLE=1 pytest tests/test_download_faults.py tests/test_verify.py tests/test_loading.py
"""

import json
import os
import re
from pathlib import Path

from glmhelpers.utils.files import whole_file

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "notebooks" / "assets" / "fault_table.json"
BUILT = ROOT / "build" / "fault_table.json"


def read(path: Path) -> dict[str, dict]:
    return {row["fault"]: row for row in json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def plain(message: str, folder: Path) -> str:
    """A message without what changes from run to run, the temporary folder and the port; addresses cut short."""
    message = message.replace(str(folder), "thuglm")
    return re.sub(r"http://127\.0\.0\.1:\d+/\S+/resolve/c{40}/", "https://source/.../", message)


def check_row(fault: str, message: str, recovery: str, folder: Path) -> None:
    row = {"fault": fault, "message": plain(message, folder), "recovery": recovery}
    paths = [BUILT, COMMITTED] if os.environ.get("GLM_RENEW_FAULT_TABLE") else [BUILT]
    for path in paths:
        rows = read(path) | {fault: row}
        with whole_file(path) as unfinished:
            text = json.dumps([rows[name] for name in sorted(rows)], ensure_ascii=False, indent=1)
            unfinished.write_text(text + "\n", encoding="utf-8")
    assert read(COMMITTED).get(fault) == row, "the committed table is out of date: see tests/fault_table.py"
