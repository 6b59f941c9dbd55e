"""Which branches of a notebook's cells ran: an IPython extension that marks them before they run, and a report.

    if run.is_tiny:            if run.is_tiny:
        a()                        __reached__(0); a()
    else:                      else:
        b()                        __reached__(1); b()
    x = c if d else e          x = (__reached__(2) or c) if d else (__reached__(3) or e)

Marked are the blocks of if, for, while, try and def, both sides of `a if b else c`, and what `and` and `or` may skip.
The notebook stays as it is: IPython hands each cell's syntax tree to the marker, line numbers are kept. After each cell
all branches are written to the file that GLM_CELL_COVERAGE names, one JSON object each: cell (its number in brackets),
line, guard (the condition it hangs on), source (its first line), reached.
"""

import ast
import builtins
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXTENSION = "cell_coverage"
FILE_VARIABLE = "GLM_CELL_COVERAGE"
MARK = "__reached__"
BLOCKS = (ast.If, ast.For, ast.While, ast.Try, ast.ExceptHandler, ast.FunctionDef, ast.match_case)


class Marker(ast.NodeTransformer):
    """Puts a mark into every branch of a tree; `branches` describes them, in the order of their numbers."""

    def __init__(self) -> None:
        self.branches: list[dict[str, Any]] = []
        self.cell = 0

    def mark(self, node: ast.AST, guard: ast.AST) -> ast.Call:
        """A call that says that the branch beginning with `node` was reached."""
        source = ast.unparse(node).splitlines()[0]
        condition = getattr(guard, "test", guard)
        facts = {"cell": self.cell, "line": getattr(node, "lineno", 0), "source": source, "reached": False}
        self.branches.append(facts | {"guard": ast.unparse(condition).splitlines()[0]})
        call = ast.Call(ast.Name(MARK, ast.Load()), [ast.Constant(len(self.branches) - 1)], [])
        return ast.fix_missing_locations(ast.copy_location(call, node))

    def visit(self, node: ast.AST) -> ast.AST:
        """Mark the branches of this node, then those inside it."""
        marks = []
        if isinstance(node, BLOCKS):
            for name in ("body", "orelse"):
                if block := getattr(node, name, None):
                    after = int(isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None)
                    if block[after:]:
                        marks.append((block, after, self.mark(block[after], node)))
        if isinstance(node, ast.IfExp):
            sides = [(name, getattr(node, name)) for name in ("body", "orelse")]
            found = [(name, self.mark(side, node)) for name, side in sides]
            self.generic_visit(node)
            for name, call in found:
                side = getattr(node, name)
                setattr(node, name, ast.copy_location(ast.BoolOp(ast.Or(), [call, side]), side))
            return node
        if isinstance(node, ast.BoolOp):
            found = [self.mark(value, node) for value in node.values[1:]]
            self.generic_visit(node)
            later = [
                ast.copy_location(ast.BoolOp(ast.Or(), [call, value]), value)
                for call, value in zip(found, node.values[1:], strict=True)
            ]
            node.values = [node.values[0], *later]
            return node
        self.generic_visit(node)
        for block, after, call in marks:
            block.insert(after, ast.copy_location(ast.Expr(call), call))
        return node


def load_ipython_extension(shell: Any) -> None:
    """Mark every cell from now on; called by IPython."""
    marker, path = Marker(), Path(os.environ[FILE_VARIABLE])

    def reached(number: int) -> None:
        marker.branches[number]["reached"] = True

    def next_cell(_: Any) -> None:
        marker.cell += 1

    def write(_: Any) -> None:
        lines = [json.dumps(branch, ensure_ascii=False) + "\n" for branch in marker.branches]
        path.write_text("".join(lines), encoding="utf-8")

    setattr(builtins, MARK, reached)
    shell.ast_transformers.append(marker)
    shell.events.register("pre_run_cell", next_cell)
    shell.events.register("post_run_cell", write)


def report(files: Sequence[Path]) -> str:
    """How many branches ran in each notebook, and which did not, once for all notebooks that share them.

    Args:
        files: what the extension wrote, one file a notebook, named after it.
    """
    lines, missed, tiny = [], defaultdict(list), 0
    for file in files:
        branches = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        lines.append(f"{file.stem}: {sum(branch['reached'] for branch in branches)} of {len(branches)} branches ran")
        for branch in branches:
            if branch["reached"]:
                continue
            if "run.is_tiny" in branch["guard"]:
                tiny += 1
            else:
                missed[branch["line"], branch["source"], branch["guard"]].append(f"{file.stem[:2]} [{branch['cell']}]")
    lines.append(f"not run, for the tiny model only: {tiny}; not run for other reasons:")
    for (number, source, guard), cells in missed.items():
        lines.append(f"  {', '.join(cells)} line {number}: {source[:90]}\n      on: {guard[:90]}")
    return "\n".join(lines)
