"""Two tutorials as notebooks, made from their pages: what is Python becomes a cell to run, a file becomes a cell that writes it.

    python docs/scripts/notebooks.py        # writes docs/notebooks/*.ipynb

A test compares the notebooks with what this makes and runs their cells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
TUTORIALS = ("first_run", "own_module")


def cell(kind: str, text: str, number: int) -> dict[str, Any]:
    """Return a cell of a notebook."""
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.strip("\n").splitlines(keepends=True), **code}


def parts(page: str) -> Iterator[tuple[str, str]]:
    """Yield kind and text of a page's cells."""
    for piece in re.split(r"(^```python.*?^```$)", page, flags=re.MULTILINE | re.DOTALL):
        if found := re.fullmatch(r'```python(?: title="([^"]+)")?\n(.*?)```', piece, flags=re.DOTALL):
            yield "code", (f"%%writefile {found[1]}\n" if found[1] else "") + found[2]
        elif piece.strip():
            yield "markdown", re.sub(r"\]\((?!\w+:)([^)#\s]+)\.md(#[^)]*)?\)", r"](../tutorials/\1.md\2)", piece)


def notebook(name: str) -> str:
    """Return a tutorial as a notebook."""
    page = re.sub(r"\n\[This page as a notebook\]\([^)]*\)\.\n", "", (DOCS / "tutorials" / f"{name}.md").read_text())
    cells = [cell(kind, text, number) for number, (kind, text) in enumerate(parts(page))]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for tutorial in TUTORIALS:
        (DOCS / "notebooks" / f"{tutorial}.ipynb").write_text(notebook(tutorial))
