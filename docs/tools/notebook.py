"""Run the cells of a notebook in order, in this process, as a kernel would.

python docs/tools/notebook.py docs/notebook.ipynb           # stores what the cells print, return and draw
python docs/tools/notebook.py docs/notebook.ipynb --check   # fails where the stored text is not what they give now
"""

from __future__ import annotations

import ast
import base64
import contextlib
import difflib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its code cells; a cell that raises ends it with that error."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            outputs = run_cell("".join(cell["source"]), names, count)
            cell = {**cell, "execution_count": count, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}


def run_cell(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Execute a cell in `names`: what it printed, the value of its last expression, and the figures left open."""
    tree = ast.parse(source)
    is_shown = bool(tree.body) and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last = ast.Expression(tree.body.pop().value) if is_shown else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)
        value = eval(compile(last, f"cell {number}", "eval"), names) if last else None
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}})
    for figure in map(plt.figure, plt.get_fignums()):
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=80)
        data = {"image/png": base64.b64encode(image.getvalue()).decode() + "\n"}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return outputs


def texts(notebook: dict[str, Any]) -> list[str]:
    """Lines of all outputs; a figure is a line that says so."""
    lines: list[str] = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            found = output.get("text") or data.get("text/plain") or ["a figure"]
            lines += [f"[{cell['execution_count']}] {line.rstrip()}" for line in found]
    return lines


def main() -> None:
    """The command line."""
    path = Path(sys.argv[1])
    stored = json.loads(path.read_text(encoding="utf-8"))
    now = executed(stored)
    if "--check" not in sys.argv[2:]:
        path.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    elif changed := list(difflib.unified_diff(texts(stored), texts(now), "stored", "now", lineterm="")):
        sys.exit("\n".join([f"{path}: its cells give something else now; store it if it is right", *changed]))


if __name__ == "__main__":
    main()
