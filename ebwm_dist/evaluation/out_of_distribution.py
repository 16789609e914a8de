"""Text that a model of something else has not seen, and that every machine has: Python's own documentation."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from pathlib import Path


def docstrings(characters: int) -> str:
    """Return about so many characters of the standard library's docstrings, in the order of its files."""
    parts: list[str] = []
    length = 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(file.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                parts.append(text)
                length += len(text) + 2
        if length >= characters:
            break
    return "\n\n".join(parts)[:characters]
