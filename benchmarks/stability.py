"""Does training stay stable over many MCMC steps? Curves of the text recipe at 2, 4, 8 and 16 of them.

    python benchmarks/stability.py --steps 2,4,8,16 --gradient full --precision fp32
    DS_ACCELERATOR=cuda python benchmarks/stability.py --steps 8 --gradient full --precision bf16
    python benchmarks/stability.py --steps 4 --change "linear head, alpha 30"
    python -m benchmarks.stability --page

Every setting is a run of `launchers/train.py` over `configs/quickstart.yaml`, and appends a line to
`results/stability.jsonl`: loss, gradient norm and alpha over the optimizer steps, thinned, and at each validation the
energy's curvature before every MCMC step. A run that its time limit ends is stored with what it has done. `--page`
writes the tables of docs/stability.md and its picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ebwm_dist.files import append_record, read_records  # noqa: E402 (a script, run from anywhere)

RESULTS = ROOT / "benchmarks" / "results" / "stability.jsonl"
PAGE, PICTURE = ROOT / "docs" / "stability.md", ROOT / "docs" / "stability.svg"
POINTS = 40
"""Most points of a curve that are kept."""
CURVES = ("loss", "loss_last_step", "grad_norm", "mcmc_step_size")

NOISE_START = ["mcmc.initial_state=random_noise"]
LINEAR = ["model.energy_head=linear", "model.add_most_recent=false", *NOISE_START]
LAST_TOKEN = ["model.add_most_recent=false", "mcmc.initial_state=most_recent_token"]
CHANGES: dict[str, list[str]] = {
    "": [],
    "alpha 0.1": ["mcmc.step_size=0.1"],
    "alpha 10": ["mcmc.step_size=10"],
    "alpha 100": ["mcmc.step_size=100"],
    "alpha 10, fixed": ["mcmc.step_size=10", "mcmc.learn_step_size=false"],
    "alpha 100, fixed": ["mcmc.step_size=100", "mcmc.learn_step_size=false"],
    "learning rate 1e-2": ["optimizer.lr=0.01"],
    "no clipping": ["optimizer.grad_clip=0"],
    "mean loss": ["mcmc.loss=mean"],
    "mirror": ["mcmc.update=mirror"],
    "no newest token": LAST_TOKEN,
    "no newest token, norm_eps 1e-2": [*LAST_TOKEN, "model.norm_eps=0.01"],
    "linear head": LINEAR,
    "linear head, no clipping": [*LINEAR, "optimizer.grad_clip=0"],
    "linear head, norm_eps 1e-2": [*LINEAR, "model.norm_eps=0.01"],
    "linear head, alpha 0.1": [*LINEAR, "mcmc.step_size=0.1"],
    "linear head, alpha 30": [*LINEAR, "mcmc.step_size=30"],
    "linear head, alpha 30, fixed": [*LINEAR, "mcmc.step_size=30", "mcmc.learn_step_size=false"],
    "linear head, alpha 30, no clipping": [*LINEAR, "mcmc.step_size=30", "optimizer.grad_clip=0"],
    "linear head, mirror": [*LINEAR, "mcmc.update=mirror"],
    "linear head, mean loss": [*LINEAR, "mcmc.loss=mean"],
}
"""What else is changed of the recipe."""


def settings(steps: int, gradient: str, precision: str, change: str, seed: int, optimizer_steps: int) -> list[str]:
    """Return the settings of a run over those of `configs/quickstart.yaml`."""
    validations = max(1, optimizer_steps // 12)
    return [
        "mcmc.step_size=1.0",
        f"mcmc.num_steps={steps}",
        "mcmc.max_num_steps=null",
        f"mcmc.gradient={gradient}",
        f"training.precision={precision}",
        f"training.max_steps={optimizer_steps}",
        f"seed={seed}",
        "validation.curvature=true",
        f"validation.interval={validations}",
        "validation.max_sequences=16",
        "checkpoint.interval=1000000",
        *CHANGES[change],
    ]


def thinned(values: list[Any]) -> list[Any]:
    """Return at most `POINTS` of the values, evenly spaced, with the first and the last."""
    if len(values) <= POINTS:
        return values
    return [values[round(i * (len(values) - 1) / (POINTS - 1))] for i in range(POINTS)]


def curves(records: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Return the curves of a run and the figures they are judged by; a norm above `limit` counts as a spike."""
    train = [record for record in records if record["kind"] == "train"]
    val = [record for record in records if record["kind"] == "val"]
    norms = [record["grad_norm"] for record in train]
    finite = [norm for norm in norms if norm is not None and math.isfinite(norm)]
    found: dict[str, Any] = {"done": len(train), "step": thinned([record["step"] for record in train])}
    for name in CURVES:
        found[name] = thinned([_short(record[name]) for record in train])
    last = [record["loss_last_step"] for record in train[-20:] if record["loss_last_step"] is not None]
    return found | {
        "final_loss": _short(statistics.mean(last)) if last else None,
        "skipped": len(norms) - len(finite),
        "spikes": sum(norm > limit for norm in finite),
        "largest_norm": _short(max(finite, default=None)),
        "median_norm": _short(statistics.median(finite)) if finite else None,
        "validation": [
            {
                "step": record["step"],
                "loss": [_short(record[f"loss_{which}_step"]) for which in ("first", "last")],
                "alpha": _short(record["mcmc_step_size"]),
                "curvature": [_short(x) for x in record.get("curvature", [])],
            }
            for record in val
        ],
    }


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def run(steps: int, args: argparse.Namespace, until: float) -> dict[str, Any]:
    """Train with one setting, at most until a time; return its line."""
    folder, begin = Path(tempfile.mkdtemp()), time.time()
    own = settings(steps, args.gradient, args.precision, args.change, args.seed, args.optimizer_steps)
    command = [sys.executable, "launchers/train.py", "--config", "configs/quickstart.yaml", *own, *args.set]
    command.append(f"run_dir={folder / 'run'}")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # the trainer saves, and leaves
        try:
            output, _ = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    records = read_records(folder / "run" / "metrics.jsonl")
    shutil.rmtree(folder, ignore_errors=True)
    errors = [line for line in output.splitlines() if line.startswith("error")]
    if not records:
        print(output[-3000:], file=sys.stderr)
    return {
        "steps": steps,
        "gradient": args.gradient,
        "precision": args.precision,
        "change": args.change,
        "set": args.set,
        "seed": args.seed,
        "optimizer_steps": args.optimizer_steps,
        "device": "cuda" if os.environ.get("DS_ACCELERATOR") == "cuda" else "cpu",
        "error": errors[-1] if errors else None,
        "seconds": round(time.time() - begin, 1),
        **curves(records, limit=10.0),
    }


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells settings apart, but for the seed."""
    return record["change"], record["precision"], record["gradient"], record["steps"]


def longest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of every setting and seed the run that has done most; no run that did nothing or has further settings."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        name = (*key(record), record["seed"])
        if record["done"] > found.get(name, {"done": 0})["done"] and not record["set"]:
            found[name] = record
    return list(found.values())


def row(runs: list[dict[str, Any]]) -> str:
    """Return the line of a table of the runs of one setting over seeds."""

    def span(values: list[float], form: str = ".2f") -> str:
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low} to {high}"

    first = runs[0]
    losses = [r["final_loss"] for r in runs if r["final_loss"] is not None]
    last = [r["validation"][-1] for r in runs if r["validation"] and r["validation"][-1]["curvature"]]
    products = [v["alpha"] * max(abs(c) for c in v["curvature"] if c is not None) for v in last]
    worst = [
        max(v["alpha"] * abs(c) for v in r["validation"] for c in v["curvature"] if c is not None)
        for r in runs
        if any(v["curvature"] for v in r["validation"])
    ]
    cells = [
        str(first["steps"]),
        "chain" if first["gradient"] == "full" else "truncated",
        first["precision"],
        str(len(runs)),
        str(min(r["done"] for r in runs)),
        span(losses) if losses else "none",
        span([r["median_norm"] for r in runs], ".3g"),
        span([r["largest_norm"] for r in runs], ".3g"),
        str(max(r["spikes"] for r in runs)),
        str(max(r["skipped"] for r in runs)),
        span([v["alpha"] for v in last], ".3g") if last else "",
        span(products, ".3g") if products else "",
        span(worst, ".3g") if worst else "",
    ]
    return " | ".join(cells)


def tables(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the lines of the tables of the page."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in longest(records):
        grouped.setdefault(key(record), []).append(record)
    head = "steps | gradient | precision | seeds | done | final loss | median norm | largest norm | above 10 | skipped"
    head += " | alpha | alpha x curvature | largest"
    rule = "--:|---|---|" + "--:|" * 10

    def part(chosen: list[tuple[Any, ...]], changed: bool) -> Iterator[str]:
        yield ("| changed | " if changed else "| ") + head + " |"
        yield "|" + "---|" * changed + rule
        for one in chosen:
            yield f"| {one[0]} | " * changed + "| " * (not changed) + row(grouped[one]) + " |"

    order = sorted(grouped, key=lambda k: (list(CHANGES).index(k[0]), k[1] == "bf16", k[2], k[3]))
    return {
        "settings": list(part([k for k in order if not k[0]], False)),
        "changes": list(part([k for k in order if k[0]], True)),
    }


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, gradient norm and alpha times curvature of the 16 settings over the optimizer steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "stability"
    import matplotlib.pyplot as plt

    kinds = [(gradient, precision) for gradient in ("full", "truncated") for precision in ("fp32", "bf16")]
    figure, axes = plt.subplots(3, 4, figsize=(13, 7.5), sharex=True, sharey="row")
    colors = dict(zip((2, 4, 8, 16), plt.get_cmap("viridis")([0.0, 0.35, 0.65, 0.9]), strict=True))
    for column, (gradient, precision) in enumerate(kinds):
        axes[0, column].set_title(f"{'chain' if gradient == 'full' else 'truncated'}, {precision}")
        for record in longest(records):
            if (record["gradient"], record["precision"], record["change"]) != (gradient, precision, ""):
                continue
            color, label = colors[record["steps"]], f"{record['steps']} steps" if record["seed"] == 0 else None
            for line, name in enumerate(("loss_last_step", "grad_norm")):
                values = [math.nan if value is None else value for value in record[name]]
                axes[line, column].plot(record["step"], values, color=color, label=label, linewidth=1)
            points = [v for v in record["validation"] if v["curvature"] and None not in v["curvature"]]
            height = [v["alpha"] * max(map(abs, v["curvature"])) for v in points]
            axes[2, column].plot([v["step"] for v in points], height, color=color, linewidth=1)
        axes[1, column].set_yscale("log")
        axes[2, column].set_yscale("log")
        axes[2, column].axhline(2, color="gray", linestyle=":", linewidth=1)
        axes[2, column].set_xlabel("optimizer step")
    for line, name in enumerate(("loss after the last step", "gradient norm", "alpha x largest curvature")):
        axes[line, 0].set_ylabel(name)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def write_page() -> None:
    """Write the tables of the page and its picture."""
    records = read_records(RESULTS)
    text = PAGE.read_text()
    for name, lines in tables(records).items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    PAGE.write_text(text)
    draw(records, PICTURE)


def main() -> None:
    """Run settings, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="2,4,8,16", help="numbers of MCMC steps, with commas between them")
    parser.add_argument("--gradient", choices=("full", "truncated"), default="full")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--change", choices=list(CHANGES), default="", help="what else is changed of the recipe")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="further settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer-steps", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=86400.0, help="of all runs together")
    parser.add_argument("--save", type=Path, default=RESULTS, help="file to which the lines are appended")
    parser.add_argument("--page", action="store_true", help="write the page from the stored lines")
    args = parser.parse_args()
    if args.page:
        write_page()
        return
    until = time.time() + args.seconds
    for steps in map(int, args.steps.split(",")):
        if time.time() + 20 > until:
            print(f"no time for {steps} steps")
            continue
        record = run(steps, args, until)
        append_record(args.save, record)
        short = ("final_loss", "largest_norm", "spikes", "skipped", "done", "seconds", "error")
        print(json.dumps({"steps": steps, "change": args.change} | {name: record[name] for name in short}), flush=True)


if __name__ == "__main__":
    main()
