"""The README's table of folders is made of the layers in pyproject.toml and of what each package says of itself.

`python -m tests.test_house` writes it anew. The directions themselves are held by import-linter, in `make check`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- folders: begin -->", "<!-- folders: end -->"


def layers() -> list[list[str]]:
    """Return the layers of the package, the highest first; modules of one layer do not import each other."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (house,) = (contract for contract in contracts if contract.get("containers") == ["ebwm_dist"])
    rooms = [[name.strip() for name in layer.split("|")] for layer in house["layers"]]
    return [[name for name in layer if not name.startswith("(")] for layer in rooms]


def summary(name: str) -> str:
    """Return the first line of a module's or package's docstring."""
    path = ROOT / "ebwm_dist" / name
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, f"ebwm_dist/{name} has no docstring"
    return docstring.splitlines()[0].rstrip(".")


def rows() -> Iterator[str]:
    """Yield the table's rows."""
    yield "| `ebwm_dist/` | what it holds; each row may import the rows below it |"
    yield "|---|---|"
    for layer in layers():
        for name in layer:
            suffix = "/" if (ROOT / "ebwm_dist" / name).is_dir() else ".py"
            yield f"| `{name}{suffix}` | {summary(name)} |"


def table() -> str:
    """Return the table between its marks."""
    return "\n".join([BEGIN, *rows(), END])


def test_the_readme_shows_the_folders_as_they_are() -> None:
    """Run `python -m tests.test_house` where this fails."""
    assert table() in README.read_text()


def test_every_module_belongs_to_a_layer() -> None:
    found = {
        path.stem for path in (ROOT / "ebwm_dist").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert found - {"__init__"} == {name for layer in layers() for name in layer}


@pytest.mark.parametrize("folder", ["ebwm_dist", "launchers", "data_tools"])
def test_files_are_short(folder: str) -> None:
    """One idea a file."""
    for path in (ROOT / folder).rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 350, f"{path} has {lines} lines: split it"


def main() -> None:
    """Write the table into the README."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + table() + rest.split(END)[1])


if __name__ == "__main__":
    main()
