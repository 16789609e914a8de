"""Wrong arguments are refused before anything slow is imported: torch takes more than a second, Ray as much."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers.jobs import REPOSITORY

SLOW = ("torch", "ray", "deepspeed", "transformers", "matplotlib", "torchvision", "numpy")
"""What no command needs in order to refuse an argument."""
PROGRAM = f"""
import atexit, runpy, sys
slow = {SLOW!r}
atexit.register(lambda: print("imported", *(name for name in slow if name in sys.modules)))
sys.argv[0] = sys.argv[1]
del sys.argv[1]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
QUICKSTART = "configs/quickstart.yaml"
CASES = [
    ("generate.py --checkpoint OUT --temperature -1", "temperature = -1.0: must be at least 0"),
    ("generate.py --checkpoint OUT --candidates 0", "candidates = 0: must be at least 1"),
    ("generate.py --checkpoint OUT --tokens 0", "--tokens 0: must be at least 1"),
    ("generate.py --checkpoint OUT/nothing", "OUT/nothing does not exist"),
    ("export.py --run OUT --out OUT/new --think-steps 0 --hub-format", "steps = 0: must be at least 1"),
    ("export.py --run OUT --out OUT", "OUT exists already"),
    ("export.py --run OUT/nothing --out OUT/new", "OUT/nothing does not exist"),
    (f"import_weights.py --weights OUT/x --config {QUICKSTART} --out OUT/new", "--weights OUT/x: no such file"),
    (f"import_weights.py --weights OUT/file --config {QUICKSTART} --out OUT", "OUT exists already"),
    (
        f"import_weights.py --weights OUT/file --config {QUICKSTART} --out OUT/new --tokenizer OUT/x",
        "OUT/x cannot be read",
    ),
    ("evaluate.py --run OUT --steps 0", "--steps: expected numbers of at least 1"),
    ("evaluate.py --run OUT/nothing", "OUT/nothing does not exist"),
    (f"plan.py --config {QUICKSTART} --gpus 4 --gpu h100 model.dimension=3", "model.dimension"),
    (f"plan.py --config {QUICKSTART} --gpus 4 --gpu none", "--gpu none"),
    (f"plan.py --config {QUICKSTART} --gpus 3 --nodes 2 --gpu h100", "--gpus 3 on --nodes 2"),
    (f"submit.py --config {QUICKSTART} --num-nodes x", "invalid int value"),
    (f"submit.py --config {QUICKSTART} --env NOT_SET_HERE", "--env NOT_SET_HERE: no such variable"),
    (f"train.py --config {QUICKSTART} model.dimension=3", "model.dimension"),
    (f"train.py --config {QUICKSTART} --dry-run model.dimension=3", "model.dimension"),
    ("watch.py OUT/nothing --once", "OUT/nothing"),
]


@pytest.mark.parametrize(("command", "reason"), CASES, ids=[command for command, _ in CASES])
def test_wrong_arguments_are_refused_at_once(command: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    name, *arguments = command.replace("OUT", str(tmp_path)).split()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"launchers/{name}", *arguments],
        cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and reason.replace("OUT", str(tmp_path)) in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "imported", done.stdout
