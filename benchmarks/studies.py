"""Keep the results of scaling studies, and write their tables and pictures in docs/scaling.md.

    python launchers/scaling.py --study configs/studies/two_cores_text.yaml --workers 2
    python -m benchmarks.studies runs/studies/two_cores_text/study.json
    python -m benchmarks.studies

The second command stores a study under the name of its folder, the third writes all tables and pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from ebwm_dist.experiments.page import fit_table, ratio_table, run_table
from ebwm_dist.experiments.plots import draw
from ebwm_dist.experiments.results import Results, from_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scaling.md"
STUDIES = ("two_cores_text", "two_cores_shapes")


def stored(name: str) -> Results:
    """Return the results of a study."""
    return from_json(json.loads((RESULTS / f"study_{name}.json").read_text()))


def tables(results: Results) -> list[str]:
    """Return the lines of the tables of a study."""
    return [*ratio_table(results), "", *fit_table(results), "", *run_table(results)]


def main() -> None:
    """Store a study, or write the page's tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", help="study.json to store")
    args = parser.parse_args()
    if args.study is not None:
        shutil.copyfile(args.study, RESULTS / f"study_{args.study.resolve().parent.name}.json")
        return
    for name in STUDIES:
        results = stored(name)
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = PAGE.read_text().split(begin)
        PAGE.write_text(before + begin + "\n".join(tables(results)) + "\n" + end + rest.split(end)[1])
        draw(results, PAGE.parent / f"scaling_{name}.png")


if __name__ == "__main__":
    main()
