"""Every command in README and docs is run: here, by `make`, or (where it needs many GPUs) as far as a dry run goes.

Those of docs/cluster.md are in tests/cluster/test_files.py.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from ebwm_dist.data.format.video_codec import encode_clip, encode_png
from ebwm_dist.prepare.moving_shapes import moving_shapes
from launchers.tune import parse_arguments as parse_tuning
from tests.tiny_data import tiny_documents

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "cluster.md")]
COMMANDS = list(
    dict.fromkeys(
        line
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
        for line in block.splitlines()
    )
)
# What `make` targets do is seen by whoever runs them; `make test` is running this.
MAKE = [command for command in COMMANDS if command.startswith("make ")]
OWN_TEXT = [command for command in COMMANDS if "mine" in command and "--follow" not in command]
FOLLOW = [command for command in COMMANDS if "--follow" in command]  # tests/cluster/test_follow.py
OWN_TASK = [command for command in COMMANDS if "my_task" in command]
OWN_VIDEO = [command for command in COMMANDS if "my_clips" in command]
OWN_IMAGES = [command for command in COMMANDS if "_images" in command]
CALIBRATION = [command for command in COMMANDS if "step.json" in command]  # needs a GPU
PLAN = [command for command in COMMANDS if "plan.py" in command and command not in CALIBRATION]
TUNE = [command for command in COMMANDS if "tune.py" in command]  # takes a while: tests/experiments/test_tuning.py
SCALING = [command for command in COMMANDS if "scaling.py" in command]
SMALL = MAKE + OWN_TEXT + OWN_TASK + FOLLOW + OWN_VIDEO + OWN_IMAGES + CALIBRATION + PLAN + TUNE + SCALING
LARGE = [command for command in COMMANDS if command not in SMALL]


def run(command: list[str], folder: Path) -> str:
    """Run a command of the README in `folder`, in this environment."""
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder that looks like the repository's, where commands may write."""
    for name in ("launchers", "data_tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_all_kinds_of_commands_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {command.split()[1] for command in MAKE} <= targets and len(MAKE) >= 5
    assert len(OWN_TEXT) == 10 and len(OWN_TASK) == 4 and len(OWN_VIDEO) == 4 and len(FOLLOW) == 1 and len(LARGE) == 7
    assert len(CALIBRATION) == 2 and len(PLAN) == 1 and len(SCALING) == 2 and len(OWN_IMAGES) == 4
    for command in TUNE:
        assert (ROOT / parse_tuning(shlex.split(command)[2:]).config).is_file()


def test_pages_and_links_are_there() -> None:
    """Every page is in the index, and every link to a file leads to one."""
    index = (ROOT / "docs" / "README.md").read_text()
    for page in [*PAGES, ROOT / "docs" / "cluster.md"]:
        assert page.name == "README.md" or f"({page.name})" in index
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_torchrun_leaves_the_options_of_evaluate_alone() -> None:
    """It takes `--run` for an abbreviation of an option of its own, unless told where its own end."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (command,) = re.findall(r"`torchrun ([^`]*launchers/evaluate.py[^`]*)`", page)
    args = get_args_parser().parse_args(command.split())
    assert args.training_script == "launchers/evaluate.py" and args.training_script_args == ["--run", "RUN"]


@pytest.mark.slow
def test_own_text_can_be_trained_on(checkout: Path) -> None:
    """The commands as they stand, with a vocabulary and a model small enough for a test."""
    (checkout / "my_text").mkdir()
    for number, document in enumerate(tiny_documents(60, words=200)):
        (checkout / "my_text" / f"document-{number}.txt").write_text(document["text"])
    small = "training.max_steps=2 training.global_batch_size=4 training.micro_batch_size=4"
    for command in OWN_TEXT:
        command = command.replace("8000", "300")
        if "launchers/train.py" in command:
            command = command.replace("deepspeed", "deepspeed --num_accelerators 1") + f" {small}"
            command = command.replace("ebt_xxs", "ebt_4xs")
        if "launchers/evaluate.py" in command:
            command += " --max-sequences 2 --batch-size 2 --steps 2 --candidates 1 --energy-tolerance 0.1"
        run(shlex.split(command), checkout)
    assert (checkout / "runs" / "mine" / "checkpoints" / "step-000002").is_dir()
    assert (checkout / "runs" / "mine" / "evaluation" / "evaluation.html").is_file()
    for name in ("mine", "hub"):
        assert (checkout / "exports" / name / "model.safetensors").is_file()
    assert (checkout / "runs" / "mine_tuned" / "initialized_from.json").is_file()


@pytest.mark.slow
def test_own_task_can_be_trained_on(checkout: Path) -> None:
    """The commands as they stand, with few documents and steps."""
    generator = "data_tools/tasks/pointers.py --out my_task.jsonl --documents 400"
    run([sys.executable, *generator.split()], checkout)
    small = "training.max_steps=2 training.global_batch_size=8 training.micro_batch_size=8"
    for command in OWN_TASK:
        if "launchers/train.py" in command:
            command = command.replace("deepspeed", "deepspeed --num_accelerators 1") + f" {small}"
        run(shlex.split(command), checkout)
    assert "by_difficulty" in (checkout / "runs" / "my_task" / "evaluation" / "evaluation.json").read_text()


@pytest.mark.slow
def test_own_video_can_be_trained_on(checkout: Path) -> None:
    """The commands as they stand, with few steps; a twentieth of three videos would hold out none."""
    (checkout / "my_videos").mkdir()
    for seed in range(3):
        frames = moving_shapes(seed, 125, 48, 64)
        (checkout / "my_videos" / f"{seed}.mp4").write_bytes(encode_clip(frames, 0.04))
    small = "training.max_steps=2 training.global_batch_size=2 training.micro_batch_size=2"
    for command in OWN_VIDEO:
        command = command.replace("--holdout-fraction 0.05", "--holdout 0.mp4")
        if "launchers/train.py" in command:
            command = command.replace("deepspeed", "deepspeed --num_accelerators 1") + f" {small}"
        run(shlex.split(command), checkout)
    assert (checkout / "data" / "my_clips.png").is_file() and (
        checkout / "data" / "my_latents" / "manifest.json"
    ).is_file()
    assert (checkout / "runs" / "my_video" / "checkpoints" / "step-000002").is_dir()


@pytest.mark.slow
def test_own_images_can_be_packed(checkout: Path) -> None:
    for number in range(40):
        folder = checkout / "my_images" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode_png(moving_shapes(number, 1, 40, 48)[0]))
    packed = [run(shlex.split(command), checkout) for command in OWN_IMAGES]
    assert "train: 1,419 images of 10 classes" in packed[1] and "1024 values" in packed[2]
    assert (checkout / "data" / "my_images.png").is_file()


@pytest.mark.slow
def test_what_fits_on_many_gpus_is_planned(checkout: Path) -> None:
    """The overrides of a plan are what the launcher takes."""
    planned = run(shlex.split(*PLAN), checkout)
    (overrides,) = re.findall(r"^overrides: (.*)$", planned, re.MULTILINE)
    described = run([sys.executable, *LARGE[0].split()[1:], *overrides.split()], checkout)
    assert "parameters: 1,145," in described


@pytest.mark.slow
def test_a_study_is_estimated(checkout: Path) -> None:
    (estimated,) = (command for command in SCALING if "--dry-run" in command)
    (trained,) = (command for command in SCALING if "--dry-run" not in command)
    assert estimated.replace("--dry-run", "--workers 2") == trained  # which takes long
    assert "runs, " in run(shlex.split(estimated), checkout)


@pytest.mark.parametrize(
    "command", [pytest.param(command, marks=() if "--dry-run" in command else pytest.mark.slow) for command in LARGE]
)
def test_large_runs_are_described(command: str, checkout: Path) -> None:
    """What needs GPUs is started as a dry run by plain python: the launcher, file and overrides are those told."""
    arguments = shlex.split(command)
    assert arguments[0] in ("deepspeed", "torchrun", "python")
    script = arguments[arguments.index("launchers/train.py") :]
    dry = script if "--dry-run" in script else [*script, "--dry-run"]
    assert "parameters: 1,145," in run([sys.executable, *dry], checkout)
