"""What a training step costs beside that of an autoregressive twin: `python benchmarks/train_step.py --json`.

Energy models of 2, 4 and 8 MCMC steps on one landscape and of 2 steps on two, the twin of the same size, and a plain
double backward of 2 steps, each in a process of its own, which take turns. On the CPU `seconds` is processor time.
`flops` are those of the formula, `flop_floor` what two steps on one landscape cost at least in units of the twin's step
where vocabulary and attention are left out: 3 F for the context and 6 F a step, against 3 F.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # when run as a file

from benchmarks.options import listed, of_training_steps, sizes  # noqa: E402
from benchmarks.second_order import Worker, environment, measure, problems_of, save  # noqa: E402

RESULTS = "train_step_{device}_torch-{torch}.json"
METHODS: dict[str, dict[str, Any]] = {
    "ebt_2": {"method": "first_order", "steps": 2},
    "ebt_2_landscapes_2": {"method": "first_order", "steps": 2, "landscapes": 2},
    "ebt_4": {"method": "first_order", "steps": 4},
    "ebt_8": {"method": "first_order", "steps": 8},
    "ebt_chain_4": {"method": "first_order", "steps": 4, "gradient": "full"},
    "ar": {"method": "autoregressive", "steps": 0},
    "double_backward": {"method": "double_backward_concatenated", "steps": 2},
}
SAME = ("double_backward", "ebt_2")
"""Methods that compute the same gradients."""
FLOP_FLOOR = 5.0


def figures(worker: Worker, tokens: int) -> dict[str, Any]:
    """Return what was measured of one method."""
    record = worker.record()
    found = {name: record[name] for name in ("seconds", "peak_bytes")}
    if record["seconds"]:
        found["tokens_per_second"] = tokens / record["seconds"]
    found["flops"] = worker.warm_up.get("flops")
    return found | ({"error": record["error"]} if "error" in record else {})


def main() -> int:
    """Measure; return 1 if a method fails, or the double backward has other gradients."""
    parser = of_training_steps(__doc__, width=768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--methods", type=listed(str, *METHODS), default=list(METHODS), help="comma-separated")
    args = parser.parse_args()
    args.memory_limit = args.time_limit = None
    names = args.methods
    setting = sizes(args) | {name: getattr(args, name) for name in ("batch", "dtype", "device")}
    workers = dict(zip(names, measure([setting | METHODS[name] for name in names], args.repeats), strict=True))
    tokens = args.batch * args.seq_len
    result: dict[str, Any] = {"setting": setting | {"repeats": args.repeats}}
    result |= {name: figures(worker, tokens) for name, worker in workers.items()}
    twin, two = (result.get(name, {}).get("seconds") for name in ("ar", "ebt_2"))
    result["ratio_to_ar"] = two / twin if two and twin else None
    result["flop_floor"] = FLOP_FLOOR
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print("| method | seconds | x twin | FLOPs x twin | peak MiB |\n|---|--:|--:|--:|--:|")
        for name in names:
            print(row(name, result))
    wrong = list(problems_of([workers[name] for name in SAME if name in workers]))
    wrong += [f"{name}: {worker.error}" for name, worker in workers.items() if worker.error and name not in SAME]
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    if args.save and not wrong:
        about = environment(args)
        record = result | {name: value for name, value in setting.items() if name not in about}
        path = ROOT / "benchmarks" / "results" / RESULTS.format(device=args.device, torch=about["torch"].split("+")[0])
        save(path, about, [record], ("seq_len", "vocab", "dtype"))
    return 1 if wrong else 0


def row(name: str, result: dict[str, Any]) -> str:
    """Return the row of one method."""
    found, twin = result[name], result.get("ar", {})
    if found["seconds"] is None:
        return f"| {name} | {found['error']} | | | |"
    ratios = [f"{found[key] / twin[key]:.2f}" if twin.get(key) and found[key] else "" for key in ("seconds", "flops")]
    return f"| {name} | {found['seconds']:.3f} | {ratios[0]} | {ratios[1]} | {found['peak_bytes'] / 2**20:.0f} |"


if __name__ == "__main__":
    sys.exit(main())
