"""An evaluation as one HTML file that needs nothing else: tables, and plots drawn as SVG inside it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebwm_dist import __version__

BLUE, ORANGE, GRAY = "tab:blue", "tab:orange", "0.6"
COLORS = {"energy": BLUE, "entropy": ORANGE}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) td { background: #f4f6f8 }
th { border-bottom: 1px solid #888; font-weight: 600 } svg { max-width: 100%; height: auto } h2 { margin-top: 2.5rem }
p.note { color: #555 }
"""


def render(evaluation: dict[str, Any]) -> str:
    """Return the page."""
    result = evaluation["model"]
    sections = [_overview(evaluation), _steps(result, evaluation.get("baseline"))]
    if "frames" in result:
        sections.append(_frames(evaluation))
    if "thinking" in result:
        sections.append(_thinking(result))
    sections += [_calibration(result), _strange(result)]
    if "choices" in result:
        sections.append(_choices(evaluation))
    if "comparison" in evaluation:
        sections.append(_comparison(evaluation))
    title = f"Evaluation of {html.escape(result['model']['path'])}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head>\n<body><h1>{title}</h1>\n{''.join(sections)}"
        f'<p class="note">ebwm_dist {__version__}. Losses are in nats for tokens, SmoothL1 for embeddings.</p>'
        "</body></html>\n"
    )


def _overview(evaluation: dict[str, Any]) -> str:
    data, rows = evaluation["data"], []
    for name in ("model", "baseline"):
        if name in evaluation:
            model, steps = evaluation[name]["model"], evaluation[name]["by_steps"]
            at = model["trained_steps"] - 1
            row: list[Any] = [model["path"], model["kind"], f"{model['parameters']:,}", model["step"]]
            row += [
                steps["loss"][at],
                *(steps[key][at] if key in steps else "" for key in ("perplexity", "bits_per_byte")),
            ]
            rows.append(row)
    note = f"{data['sequences']:,} held-out sequences of {data['folder']}, {data['predictions']:,} predictions."
    return f"<p>{html.escape(note)}</p>" + _table(
        ["model", "kind", "parameters", "step", "loss", "perplexity", "bits per byte"], rows
    )


def _steps(result: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    steps = result["by_steps"]
    columns = [name for name in ("loss", "perplexity", "bits_per_byte") if name in steps]
    rows = [[number, *(steps[name][i] for name in columns)] for i, number in enumerate(steps["steps"])]
    head = ["MCMC steps", *(name.replace("_", " ") for name in columns)]
    if "energy" in steps:
        head += ["change of the loss from step 1", "energy"]
        for i, row in enumerate(rows):
            row += [_plus_minus(*steps["change_from_first"][i]), steps["energy"][i + 1]]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps["steps"], steps["loss"], "o-", color=BLUE, label="loss")
    trained = result["model"]["trained_steps"]
    if "energy" in steps:
        left.axvline(trained, color=GRAY, linestyle=":", label="as trained")
        energy = left.twinx()
        energy.plot([0, *steps["steps"]], steps["energy"], "s--", color=ORANGE)
        energy.set_ylabel("energy", color=ORANGE)
    if baseline is not None:
        left.axhline(baseline["by_steps"]["loss"][0], color=GRAY, linestyle="--", label="baseline")
    left.set(title="After each MCMC step", xlabel="MCMC steps", ylabel="held-out loss")
    left.legend()
    right.plot(steps["flops_per_prediction"], steps["loss"], "o-", color=BLUE, label="MCMC steps")
    for row in result.get("thinking", []):
        if row["candidates"] > 1 or row["energy_tolerance"] is not None or row["accept_only_decrease"]:
            right.plot(row["flops_per_prediction"], row["loss"], "^", label=_way(row))
    if baseline is not None:
        other = baseline["by_steps"]
        right.plot(other["flops_per_prediction"], other["loss"], "D", color=GRAY, label="baseline")
    right.set(title="Against the compute of a prediction", xlabel="FLOPs per prediction", xscale="log")
    right.legend(fontsize="small")
    return "<h2>Loss by MCMC steps</h2>" + _table(head, rows) + _svg(figure)


def _frames(evaluation: dict[str, Any]) -> str:
    rows = [["copy of the last frame", *evaluation["model"]["frames"]["copy"].values()]]
    for name in ("model", "baseline"):
        for step, errors in evaluation.get(name, {}).get("frames", {}).items():
            if step != "copy":
                rows.append([f"{name}, step {step}", *errors.values()])
    note = "Mean errors of the predicted frames, of normalised embeddings, and of pictures where they can be decoded."
    head = [name.replace("_", " ") for name in evaluation["model"]["frames"]["copy"]]
    return f"<h2>Frames</h2><p>{note}</p>" + _table(["", *head], rows)


def _thinking(result: dict[str, Any]) -> str:
    rows = [
        [
            _way(row),
            row["loss"],
            _plus_minus(*row["change"]),
            row["energy"],
            row["mean_steps"],
            row["mean_nfe"],
            f"{row['flops_per_prediction']:.3g}",
        ]
        for row in result["thinking"]
    ]
    head = ["thinking", "loss", "change (± standard error)", "energy", "steps taken", "nfe", "FLOPs"]
    return (
        "<h2>Thinking</h2><p>Ways to think about each prediction, against that of training. Noise is drawn anew for "
        "these, so that losses differ a little from those above.</p>" + _table(head, rows)
    )


def _way(row: dict[str, Any]) -> str:
    parts = [f"{row['steps']} steps"]
    if row["candidates"] > 1:
        parts.append(f"best of {row['candidates']}")
    if row["energy_tolerance"] is not None:
        parts.append(f"stop at {row['energy_tolerance']:g}")
    if row["accept_only_decrease"]:
        parts.append("only downhill")
    return ", ".join(parts)


def _calibration(result: dict[str, Any]) -> str:
    found = result["calibration"]
    names = [name for name in COLORS if name in found]
    rows = [
        [
            name,
            *(found[name][key] for key in ("pearson", "spearman", "spearman_of_sequences")),
            *(found[name]["risk_coverage"][key] for key in ("aurc", "best", "chance")),
        ]
        for name in names
    ]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(names):
        axes = left if number == 0 else left.twiny()
        bins = found[name]["reliability"]
        axes.plot([b["uncertainty"] for b in bins], [b["loss"] for b in bins], "o-", color=COLORS[name])
        axes.set_xlabel(f"mean {name} of a tenth of the predictions", color=COLORS[name])
        curve = found[name]["risk_coverage"]
        right.plot(curve["coverage"], curve["risk"], color=COLORS[name], label=f"{name}, AURC {curve['aurc']:.3f}")
    left.set_ylabel("mean loss")
    if not names:
        return ""
    right.axhline(found["loss"], color=GRAY, linestyle="--", label="knowing nothing")
    right.set(
        title="Risk-coverage", xlabel="share of predictions kept, the most certain ones", ylabel="their mean loss"
    )
    right.legend()
    accuracy = f" The most probable token is right in {found['accuracy']:.1%}." if "accuracy" in found else ""
    head = ["uncertainty", "Pearson", "Spearman", "Spearman of sequences", "AURC", "best possible", "chance"]
    return (
        "<h2>Does the model know when it is wrong?</h2><p>Correlation of its uncertainty with the true loss of the "
        f"prediction, and the loss that is left when uncertain predictions are given up.{accuracy}</p>"
        + _table(head, rows)
        + _svg(figure)
    )


def _strange(result: dict[str, Any]) -> str:
    worlds = result["out_of_distribution"]
    scores = [name for name in next(iter(worlds.values())) if name != "sequences"]
    rows = [
        [f"{world} ({found['sequences']} sequences)", *(_plus_minus(*found[name]["auroc"]) for name in scores)]
        for world, found in worlds.items()
    ]
    figure = Figure(figsize=(10, 2.6 * len(worlds)), layout="constrained")
    grid = figure.subplots(len(worlds), len(scores), squeeze=False)
    for line, (world, found) in zip(grid, worlds.items(), strict=True):
        for axes, name in zip(line, scores, strict=True):
            _histogram(axes, *found[name]["scores"])
            axes.set_title(f"{world}\n{name}", fontsize="small")
    return (
        "<h2>Does it notice what is strange?</h2><p>Chance that a strange sequence scores higher than a held-out one "
        "(AUROC ± standard error): 0.5 is a guess; below it the strange ones score lower. Orange: strange sequences, "
        "blue: held-out ones.</p>" + _table(["strange sequences", *scores], rows) + _svg(figure)
    )


def _histogram(axes: Axes, strange: Sequence[float], usual: Sequence[float]) -> None:
    low, high = min(*strange, *usual), max(*strange, *usual)
    edges = [low + (high - low) * i / 30 for i in range(31)] if high > low else 10
    for values, color in ((usual, BLUE), (strange, ORANGE)):
        axes.hist(values, bins=edges, density=True, alpha=0.6, color=color)
    axes.set_yticks([])


def _choices(evaluation: dict[str, Any]) -> str:
    rows = []
    for name in ("model", "baseline"):
        for way, pair in evaluation.get(name, {}).get("choices", {}).get("accuracy", {}).items():
            rows.append([f"{name}: {way}", _plus_minus(*pair)])
    number = evaluation["model"]["choices"]["questions"]
    return f"<h2>Choices</h2><p>Share of {number} questions answered rightly.</p>" + _table(
        ["chosen by", "right"], rows
    )


def _comparison(evaluation: dict[str, Any]) -> str:
    found = evaluation["comparison"]
    rows = [
        [
            name,
            f"{found[name]['parameters']:,}",
            *(
                "unknown" if found[name][key] is None else f"{found[name][key]:.4g}"
                for key in ("tokens", "training_flops")
            ),
            found[name]["loss"],
        ]
        for name in ("model", "baseline")
    ]
    text = "<h2>Beside the baseline</h2>" + _table(
        ["", "parameters", "training tokens", "training FLOPs", "held-out loss"], rows
    )
    if "equal_flops" not in found:
        return text + '<p class="note">An export tells nothing of its training: no comparison at equal FLOPs.</p>'
    equal = found["equal_flops"]
    losses = " and ".join(
        f"{name} {'was not validated as early' if equal[name] is None else format(equal[name], '.4f')}"
        for name in ("model", "baseline")
    )
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, color in (("model", BLUE), ("baseline", ORANGE)):
        curve = evaluation[name]["model"]["validation_by_flops"]
        axes.plot([x for x, _ in curve], [y for _, y in curve], "o-", color=color, label=name)
    axes.axvline(equal["flops"], color=GRAY, linestyle=":", label="equal FLOPs")
    axes.set(title="Validation while training", xlabel="training FLOPs", ylabel="loss", xscale="log")
    axes.legend()
    return (
        text + f"<p>At {equal['flops']:.3g} training FLOPs, by the runs' own validations: {losses}.</p>" + _svg(figure)
    )


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return html.escape(f"{value:.4f}" if isinstance(value, float) else str(value))

    lines = ["".join(f"<td>{cell(value)}</td>" for value in row) for row in rows]
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>\n"


def _svg(figure: Figure) -> str:
    """Return a figure as an element of the page; text stays text, and no date makes it differ from run to run."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "evaluation"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    # The document type and the metadata name addresses elsewhere; the element alone needs neither.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return f"<figure>{svg}</figure>\n"
