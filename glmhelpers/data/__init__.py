"""Data: any Alpaca-like file becomes rows, and no row is lost silently.

files.py  -->  readers.py  -->  json_recovery.py  -->  cleaning.py  -->  dedupe.py  -->  convert.py  -->  report.py
which files    what format      broken JSON            one row           twice          JSON Lines        what happened
"""

from glmhelpers.data.broken_examples import write_broken_files
from glmhelpers.data.convert import convert_alpaca
from glmhelpers.data.dedupe import general_rows
from glmhelpers.data.report import Report

__all__ = ["Report", "convert_alpaca", "general_rows", "write_broken_files"]
