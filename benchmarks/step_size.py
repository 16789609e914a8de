"""How far is `mcmc.step_size=auto` from the best step size, over widths, vocabularies and kinds of energy?

    python -m benchmarks.step_size --case "bilinear, width 128, vocabulary 1000" --alphas auto,1,4 --seed 1
    python -m benchmarks.step_size

The first trains models for some steps of a few sequences, one for each alpha, and appends their held-out losses to
`results/step_size.jsonl`; the second prints the table of docs/tuning.md. Alpha is learned, as the shipped
configurations have it. Text is that of `make data`, its words as tokens where the vocabulary has not 1,000; frames are
those of `make data-shapes`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.stream import SampleStream
from ebwm_dist.files import append_record, read_records
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.training.optimizer import group_settings, lr_scale

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step_size.jsonl"
LENGTH = 64
HELD_OUT = 64
"""Sequences that are never trained on; half of them are evaluated."""
PUBLISHED = ["optimizer.lr=2.4e-3", "mcmc.step_size_lr_multiplier=null", "optimizer.final_lr_ratio=0.0"]


@dataclass(frozen=True)
class Case:
    """A configuration and its length in steps."""

    file: str
    settings: tuple[str, ...]
    vocabulary: int | None
    batch: int
    steps: int


def text(dim: int, vocabulary: int, steps: int) -> Case:
    """Return the quickstart's energy at another size."""
    shape = f"model.dim={dim}", f"model.num_heads={dim // 64}", f"model.vocab_size={vocabulary}"
    return Case("quickstart", (*shape, f"data.sequence_length={LENGTH}"), vocabulary, 4, steps)


def published(dim: int, vocabulary: int, steps: int) -> Case:
    """Return the published recipe, with two layers."""
    shape = *text(dim, vocabulary, steps).settings, "model.num_layers=2"
    return Case("ebt_base", (*shape, *PUBLISHED), vocabulary, 4, steps)


CASES = {
    **{
        f"bilinear, width {dim}, vocabulary 1000": text(dim, 1000, 60 if dim > 128 else 100)
        for dim in (64, 128, 256, 512)
    },
    "bilinear, width 64, vocabulary 8000": text(64, 8000, 60),
    "bilinear, width 64, vocabulary 32000": text(64, 32000, 40),
    "published, width 128, vocabulary 1000": published(128, 1000, 80),
    "published, width 64, vocabulary 8000": published(64, 8000, 60),
    "frames, bilinear, width 64": Case("ebwm_video_shapes", ("model.energy_head=bilinear",), None, 32, 120),
}


def sequences(case: Case) -> Tensor:
    """Return all sequences [N, S + 1, ...] of a case, shuffled."""
    if case.vocabulary not in (None, 1000):
        texts = [json.loads(line)["text"] for line in (ROOT / "data" / "raw" / "sample.jsonl").open()]
        if case.vocabulary > 8000:  # English has not as many words as that
            texts += [path.read_text(errors="ignore") for path in sorted(Path(re.__file__).parent.glob("**/*.py"))]
        words = [word for line in texts for word in re.findall(r"\w+|\s|[^\w\s]", line)]
        ids = {word: number + 2 for number, (word, _) in enumerate(Counter(words).most_common(case.vocabulary - 2))}
        tokens = torch.tensor([ids.get(word, 1) for word in words])
    else:
        folder, length = ("shapes_latents", 15) if case.vocabulary is None else ("text", 128)
        setting = [f"data.path={ROOT / 'data' / folder}", f"data.sequence_length={length}"]
        data = load_config(ROOT / "configs" / "quickstart.yaml", setting).data
        batch = 32 if case.vocabulary is None else 8
        order = {"global_batch_size": batch, "micro_batch_size": batch, "dp_rank": 0, "dp_world_size": 1}
        stream = SampleStream(data, Mixture.load(data), seed=0, **order)
        tokens = torch.cat([next(stream).observed for _ in range(60 if case.vocabulary is None else 200)])
        if case.vocabulary is None:
            return tokens.float()
    count = tokens.numel() // (LENGTH + 1)
    rows = tokens.flatten()[: count * (LENGTH + 1)].view(count, LENGTH + 1)
    return rows[torch.randperm(count, generator=torch.Generator().manual_seed(1))]


def fresh(case: Case, alpha: float, seed: int) -> tuple[Config, EnergyBasedTransformer]:
    """Return the configuration of a run and its model."""
    steps = f"training.max_steps={case.steps}", f"optimizer.warmup_steps={max(1, case.steps // 10)}"
    batch = f"training.global_batch_size={case.batch}", f"training.micro_batch_size={case.batch}"
    settings = [*case.settings, *steps, *batch, f"mcmc.step_size={alpha!r}", f"seed={seed}"]
    config = load_config(ROOT / "configs" / f"{case.file}.yaml", settings)
    torch.manual_seed(seed)
    model = build_model(config, 0)
    assert isinstance(model, EnergyBasedTransformer)
    return config, model


def suggested(case: Case, seed: int, held_out: Tensor) -> float:
    """Return what the rule gives, of eight sequences. Frames, for which it is not shipped, would be moved by what lies
    between the last and the next one."""
    _, model = fresh(case, 1.0, seed)
    observed = held_out[:8]
    if case.vocabulary is not None:
        squares, targets = model.move_at_targets(observed, torch.arange(8)).tolist()
        return float(f"{math.sqrt(targets / squares):.2g}")
    context, following = observed[:, :-1], observed[:, 1:]
    with torch.no_grad():
        pairs, candidate = model.context_stream(context, 0), model.space.embed_next(following)
        _, gradient, _ = model.transformer.energy_and_gradient(candidate, pairs, 0, 0)
        moved = model.space.update(context, gradient) - context
    return float(f"{((following - context).square().mean() / moved.square().mean()).sqrt():.2g}")


def train(case: Case, alpha: float, seed: int, held_out: Tensor, rows: Tensor) -> dict[str, Any]:
    """Train a model and return its held-out loss after the last MCMC step."""
    begin = time.process_time()
    config, model = fresh(case, alpha, seed)
    named, settings = dict(model.named_parameters()), group_settings(config, 1.0)
    rest = {"params": [p for name, p in named.items() if not name.endswith("alpha")], **settings["rest"]}
    optimizer = torch.optim.AdamW([rest, {"params": [model.space.step_size.alpha], **settings["alpha"]}], fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, case.steps + 1):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_scale(config, step)
        chosen = torch.randint(len(rows), (case.batch,), generator=generator)
        optimizer.zero_grad()
        model.training_step(rows[chosen], step * case.batch + torch.arange(case.batch), model.plan(step, 0))
        norm = torch.nn.utils.clip_grad_norm_(named.values(), config.optimizer.grad_clip)
        if norm.isfinite():
            optimizer.step()
    half, ids = held_out[: HELD_OUT // 2], torch.arange(10**6, 10**6 + HELD_OUT // 2)
    found = model.evaluate(half, ids, config.mcmc.max_mcmc_steps)
    loss = (found.step_losses[-1].sum() / found.tokens.sum()).item()
    seconds = round(time.process_time() - begin, 1)
    return {"steps": case.steps, "loss": loss, "alpha_end": model.space.step_size().item(), "seconds": seconds}


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table: the loss at the suggested alpha against the best of those that were tried."""
    runs: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    rule: dict[tuple[str, int], float] = {}
    for record in records:
        key = record["case"], record["seed"]
        rule[key] = record["suggested"]
        runs[key][record["alpha"]] = record["loss"]
    yield "| model | steps | seed | the rule | optimum | losses by alpha, that of the rule in bold | above the lowest |"
    yield "|---|--:|--:|--:|--:|---|--:|"
    for key, found in sorted(runs.items(), key=lambda item: (list(CASES).index(item[0][0]), item[0][1])):
        alpha, lowest = rule[key], min(found.values())
        cells = [f"{a:g}: {found[a]:.4g}" for a in sorted(found)]
        shown = ", ".join(f"**{cell}**" if a == alpha else cell for a, cell in zip(sorted(found), cells, strict=True))
        above = f"{100 * (found[alpha] / lowest - 1):.1f} %" if alpha in found else ""
        best = optimum(found)
        where = "" if best is None else f"{best:.2g}"
        yield f"| {key[0]} | {CASES[key[0]].steps} | {key[1]} | {alpha:g} | {where} | {shown} | {above} |"


def optimum(losses: dict[float, float]) -> float | None:
    """Return where a parabola of log alpha through the best alpha and its neighbours is lowest; None at an edge."""
    alphas = sorted(losses)
    middle = alphas.index(min(alphas, key=lambda alpha: losses[alpha]))
    if middle in (0, len(alphas) - 1):
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(a), losses[a]) for a in alphas[middle - 1 : middle + 2])
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return math.exp((x0 + x1) / 2 - first * (x2 - x0) / 2 / (second - first))


def main() -> None:
    """Train and append lines, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), help="without it, print the table")
    parser.add_argument("--alphas", default="auto", help="with commas between them; auto is what the rule gives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.case is None:
        print("\n".join(table(read_records(RESULTS))))
        return
    case = CASES[args.case]
    rows = sequences(case)
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    rule = suggested(case, args.seed, held_out)
    for word in args.alphas.split(","):
        alpha = rule if word == "auto" else float(word)
        record = {"case": args.case, "seed": args.seed, "suggested": rule, "alpha": alpha}
        record |= train(case, alpha, args.seed, held_out, rows)
        print(json.dumps(record), flush=True)
        append_record(args.save, record)


if __name__ == "__main__":
    main()
