"""An evaluation as one HTML file that needs nothing else: tables, and plots drawn as SVG inside it."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebwm_dist import __version__

BLUE, ORANGE, GRAY = "tab:blue", "tab:orange", "0.6"
COLORS = {"energy": BLUE, "entropy": ORANGE, "change of the frame": ORANGE}
UNCERTAINTY = {
    "pearson": "Pearson",
    "spearman": "Spearman",
    "spearman_of_sequences": "Spearman of sequences",
    "worst_tenth": "worst tenth",
    "aurc": "AURC",
    "best": "best possible",
    "chance": "chance",
}
"""The columns of the table of calibration."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) td { background: #f4f6f8 }
th { border-bottom: 1px solid #888; font-weight: 600 } svg { max-width: 100%; height: auto } h2 { margin-top: 2.5rem }
p.note { color: #555 }
"""

_NOTE = "Losses: nats for tokens, SmoothL1 for embeddings; for diffusion models squared errors of noise or velocity."
_REFERENCE = "-"
"""In place of a row's difference from itself."""

Models = dict[str, dict[str, Any]]
"""The measurements of `model` and, if there is one, `baseline`."""


def render(evaluation: dict[str, Any]) -> str:
    """Return the page."""
    models: Models = {name: evaluation[name] for name in ("model", "baseline") if name in evaluation}
    model = models["model"]
    sections = [_overview(models, evaluation["data"]), _steps(models)]
    if "frames" in model["by_steps"]:
        sections.append(_frames(models))
    if "by_difficulty" in model:
        sections.append(_by_difficulty(models))
    if "thinking" in model:
        sections.append(_thinking(model))
    sections += [_calibration(model), _out_of_distribution(model)]
    if "multiple_choice" in model:
        sections.append(_multiple_choice(models))
    if "equal_flops" in evaluation:
        sections.append(_equal_flops(evaluation["equal_flops"], models))
    title = f"Evaluation of {html.escape(model['model']['path'])}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head>\n<body><h1>Evaluation</h1>\n{''.join(sections)}"
        f'<p class="note">ebwm_dist {__version__}. {_NOTE}</p></body></html>\n'
    )


def _overview(models: Models, data: dict[str, Any]) -> str:
    columns = [name for name in _LOSSES if name in models["model"]["by_steps"]]
    rows = []
    for name, one in models.items():
        model, by_steps = one["model"], one["by_steps"]
        trained = ["unknown" if model[key] is None else f"{model[key]:.4g}" for key in ("tokens", "training_flops")]
        figures = [_loss(key, by_steps[key][model["trained_steps"] - 1]) for key in columns]
        row = [name, model["path"], model["kind"], f"{model['parameters']:,}", model["step"], *trained, *figures]
        rows.append(row)
    note = f"{data['sequences']:,} held-out sequences of {data['folder']}, {data['predictions']:,} predictions."
    head = ["", "path", "kind", "parameters", "step", "training tokens", "training FLOPs"]
    return f"<p>{html.escape(note)}</p>" + _table([*head, *(_LOSSES[name] for name in columns)], rows)


_LOSSES = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}


def _loss(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"


def _steps(models: Models) -> str:
    model, baseline = models["model"], models.get("baseline", models["model"])
    steps = model["by_steps"]
    columns = [name for name in _LOSSES if name in steps]
    rows = [[number, *(_loss(name, steps[name][i]) for name in columns)] for i, number in enumerate(steps["steps"])]
    head = ["MCMC steps", *(_LOSSES[name] for name in columns)]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps["steps"], steps["loss"], "o-", color=BLUE, label="loss")
    if "energy" in steps:
        head += ["change of the loss from step 1", "energy"]
        for i, row in enumerate(rows):
            row += [_plus_minus(*steps["change_from_first"][i]) if i else _REFERENCE, steps["energy"][i + 1]]
        left.axvline(model["model"]["trained_steps"], color=GRAY, linestyle=":", label="as trained")
        energy = left.twinx()
        energy.plot([0, *steps["steps"]], steps["energy"], "s--", color=ORANGE)
        energy.set_ylabel("energy", color=ORANGE)
    right.plot(steps["flops_per_prediction"], steps["loss"], "o-", color=BLUE, label="MCMC steps")
    for row in model.get("thinking", []):
        if "," in _way(row):  # more than a number of steps
            right.plot(row["flops_per_prediction"], row["loss"], "^", label=_way(row))
    if baseline is not model and baseline["model"]["loss_of"] == model["model"]["loss_of"]:
        other = baseline["by_steps"]
        left.axhline(other["loss"][0], color=GRAY, linestyle="--", label="baseline")
        right.plot(other["flops_per_prediction"], other["loss"], "D", color=GRAY, label="baseline")
    left.set(title="After each MCMC step", xlabel="MCMC steps", ylabel="held-out loss")
    left.legend()
    right.set(title="Against the compute of a prediction", xlabel="FLOPs per prediction", xscale="log")
    right.legend(fontsize="small")
    return "<h2>Loss by MCMC steps</h2>" + _table(head, rows) + _svg(figure)


def _frames(models: Models) -> str:
    copied = models["model"]["by_steps"]["frames"]["copy"]
    rows = [["copy of the last frame", *_errors(copied)]]
    for name, one in models.items():
        for step, errors in one["by_steps"]["frames"].items():
            if step != "copy":
                rows.append([f"{name}, step {step}", *_errors(errors)])
    changes = models["model"]["by_steps"]["scene_changes"]
    page = (
        "<h2>Frames</h2><p>Mean errors of the predicted frames, of normalised embeddings, and of pictures where they "
        f"can be decoded. {changes:,} frames that start another scene do not count.</p>"
    ) + _table(["", *(name.replace("_", " ") for name in copied)], rows)
    if "true_frame_is_lower" in models["model"]:
        shares = models["model"]["true_frame_is_lower"]
        page += "<p>How often the true next frame has a lower energy than frames that do not follow.</p>"
        page += _table(["", "share"], [[name, _plus_minus(*pair)] for name, pair in shares.items()])
    return page


def _errors(errors: dict[str, Any]) -> list[Any]:
    return [_plus_minus(*value) if name == "mse_minus_copy" else value for name, value in errors.items()]


def _by_difficulty(models: Models) -> str:
    found = models["model"]["by_difficulty"]
    stopped, levels = found.get("stopped", []), found["difficulties"]
    head = ["difficulty", "answers", *(f"{n} step{'s' * (n != 1)}" if n else "accuracy" for n in found["steps"])]
    columns: list[Sequence[Any]] = [*zip(*found["accuracy"], strict=True)]
    for one in stopped:
        limit = f"stop at a change of {one['prediction_tolerance']:g}"
        head += [limit, "steps taken"]
        columns += [one["accuracy"], one["steps"]]
    if "baseline" in models:
        other, trained = models["baseline"]["by_difficulty"], models["baseline"]["model"]["trained_steps"]
        place = other["steps"].index(trained) if trained in other["steps"] else 0
        head.append("baseline")
        columns.append([row[place] for row in other["accuracy"]])
    cells = zip(*([_plus_minus(*pair) for pair in column] for column in columns), strict=True)
    rows = [[level, n, *row] for level, n, row in zip(levels, found["answers"], cells, strict=True)]
    cost = ["FLOPs per prediction", "", *(f"{flops:.3g}" for flops in found["flops_per_prediction"])]
    for one in stopped:
        cost += [f"{one['flops_per_prediction']:.3g}", ""]
    rows.append([*cost, *[""] * (len(head) - len(cost))])
    page = (
        "<h2>Answers by difficulty</h2><p>Accuracy of answers (every token is the most probable one), ± standard "
        "error, by the number of MCMC steps.</p>"
    ) + _table(head, rows)
    if "energies" not in found:
        return page
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
    left, right = top.subplots(1, 2)
    for place, (level, row) in enumerate(zip(levels, found["accuracy"], strict=True)):
        color = colormaps["viridis"](0.9 * place / max(len(levels) - 1, 1))
        left.plot(found["steps"], [share for share, _ in row], "o-", color=color, label=f"difficulty {level}")
    left.set(title="Accuracy by MCMC steps", xlabel="MCMC steps", ylabel="accuracy", ylim=(-0.03, 1.03))
    left.legend(fontsize="small")
    for one in stopped:
        label = f"change {one['prediction_tolerance']:g}, correlation {one['correlation']:.2f}"
        right.errorbar(levels, *zip(*one["steps"], strict=True), fmt="o-", capsize=3, label=label)
    right.set(title="Steps until the prediction stops", xlabel="difficulty", ylabel="MCMC steps")
    right.legend(fontsize="small")
    parts = zip(
        bottom.subplots(1, len(found["steps"]), squeeze=False)[0], found["steps"], found["energies"], strict=True
    )
    for (axes, number, energies), area in zip(parts, found["auroc"], strict=True):
        for name, fill in (("right", BLUE), ("wrong", ORANGE)):
            axes.stairs(energies[name], energies["edges"], fill=True, color=fill, alpha=0.6)
        auroc = "" if area is None else f"\nAUROC {area:.2f}"
        axes.set_title(f"after {number} step{'s' * (number != 1)}{auroc}", fontsize="small")
        axes.set_yticks([])
    note = "Below: energies of right (blue) and wrong (orange) answers. AUROC is the chance that a wrong one has more."
    rows = [["energy", *found["auroc"]], ["surprisal of the least certain step", *found["auroc_of_surprisal"]]]
    page += "<p>AUROC of wrong against right answers.</p>" + _table(["", *head[2 : 2 + len(found["steps"])]], rows)
    return page + _best_of(found["best_of"]) + f"<p>{note}</p>" + _svg(figure)


def _best_of(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    ways = [name for name in found[0] if name not in ("candidates", "steps")]
    rows = [[f"best of {one['candidates']}", *(_plus_minus(*one[way]) for way in ways)] for one in found]
    note = f"Accuracy with several candidates of {found[0]['steps']} steps, by what chooses between them."
    return f"<p>{note}</p>" + _table(["", *ways], rows)


def _thinking(model: dict[str, Any]) -> str:
    rows = [
        [
            _way(row),
            row["loss"],
            _plus_minus(*row["change"]) if number else _REFERENCE,
            row["energy"],
            f"{row['mean_steps']:.2f}",
            f"{row['mean_nfe']:.2f}",
            f"{row['flops_per_prediction']:.3g}",
        ]
        for number, row in enumerate(model["thinking"])
    ]
    head = ["thinking", "loss", "change (± standard error)", "energy", "steps taken", "NFE", "FLOPs"]
    return (
        "<h2>Thinking</h2><p>Ways to think about each prediction, against that of training. NFE counts energy "
        "evaluations. Noise is drawn anew for these, so that losses differ a little from those above.</p>"
    ) + _table(head, rows)


def _way(row: dict[str, Any]) -> str:
    parts = [f"{row['steps']} steps"]
    if row["candidates"] > 1:
        parts.append(f"best of {row['candidates']}")
    if row["energy_tolerance"] is not None:
        parts.append(f"stop at {row['energy_tolerance']:g}")
    if row["prediction_tolerance"] is not None:
        parts.append(f"stop at a change of {row['prediction_tolerance']:g}")
    if row["accept_only_decrease"]:
        parts.append("only decreases")
    return ", ".join(parts)


def _calibration(model: dict[str, Any]) -> str:
    found = model["calibration"]
    names = [name for name in COLORS if name in found]
    if not names:
        return ""
    every = {name: one | one["risk_coverage"] for name, one in found.items() if isinstance(one, dict)}
    rows = [[name, *(one[key] for key in UNCERTAINTY)] for name, one in every.items()]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(names):
        one, curve = found[name], found[name]["risk_coverage"]
        axes = left if number == 0 else left.twiny()
        axes.plot(*zip(*((b["uncertainty"], b["loss"]) for b in one["reliability"]), strict=True), "o-", c=COLORS[name])
        axes.set_xlabel(f"mean {name} of a tenth of the predictions", color=COLORS[name])
        right.plot(curve["coverage"], curve["risk"], color=COLORS[name], label=f"{name}, AURC {curve['aurc']:.3f}")
    left.set_ylabel("mean loss")
    right.axhline(found["loss"], color=GRAY, linestyle="--", label="random")
    right.set(title="Risk-coverage", xlabel="share of predictions kept, the most certain first", ylabel="mean loss")
    right.legend()
    accuracy = f" The most probable token is right in {found['accuracy']:.1%}." if "accuracy" in found else ""
    return (
        "<h2>Calibration</h2><p>Correlation of uncertainties with the true loss, AUROC of finding the tenth with the "
        f"largest loss, and the loss that is left when uncertain predictions are dropped.{accuracy}</p>"
    ) + (_table(["uncertainty", *UNCERTAINTY.values()], rows) + _svg(figure))


def _out_of_distribution(model: dict[str, Any]) -> str:
    kinds = model["out_of_distribution"]
    scores = [name for name in next(iter(kinds.values())) if name != "sequences"]
    rows = [
        [f"{kind} ({found['sequences']} sequences)", *(_plus_minus(*found[name]["auroc"]) for name in scores)]
        for kind, found in kinds.items()
    ]
    figure = Figure(figsize=(10, 2.6 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), len(scores), squeeze=False)
    for line, (kind, found) in zip(grid, kinds.items(), strict=True):
        for axes, name in zip(line, scores, strict=True):
            _histogram(axes, *found[name]["scores"])
            axes.set_title(f"{kind}\n{name}", fontsize="small")
    return (
        "<h2>Out of distribution</h2><p>Chance that an out-of-distribution sequence (orange) scores higher than a "
        "held-out one (blue): AUROC ± standard error. 0.5 is a guess; below it they score lower.</p>"
    ) + (_table(["sequences", *scores], rows) + _svg(figure))


def _histogram(axes: Axes, ood: Sequence[float], held_out: Sequence[float]) -> None:
    pair = [[value for value in values if math.isfinite(value)] for values in (held_out, ood)]
    if all(pair):
        low, high = (limit(*pair[0], *pair[1]) for limit in (min, max))
        edges = [low + (high - low) * i / 30 for i in range(31)] if high > low else 10
        for values, color in zip(pair, (BLUE, ORANGE), strict=True):
            axes.hist(values, bins=edges, density=True, alpha=0.6, color=color)
    axes.set_yticks([])


def _multiple_choice(models: Models) -> str:
    rows = [
        [f"{name}: {way}", _plus_minus(*pair)]
        for name, one in models.items()
        for way, pair in one["multiple_choice"]["accuracy"].items()
    ]
    number = models["model"]["multiple_choice"]["questions"]
    note = f"Accuracy over {number} questions, by the score that chooses."
    return f"<h2>Multiple choice</h2><p>{note}</p>" + _table(["chosen by", "accuracy"], rows)


def _equal_flops(found: dict[str, Any] | None, models: Models) -> str:
    title = "<h2>At equal training FLOPs</h2>"
    if found is None:
        return title + '<p class="note">An export has no record of its training: no comparison at equal FLOPs.</p>'
    losses = " and ".join(
        f"{name} {'was not validated as early' if found[name] is None else format(found[name], '.4f')}"
        for name in models
    )
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, one), color in zip(models.items(), (BLUE, ORANGE), strict=True):
        curve = one["model"]["validation_by_flops"]
        axes.plot([x for x, _ in curve], [y for _, y in curve], "o-", color=color, label=name)
    axes.axvline(found["flops"], color=GRAY, linestyle=":", label="equal FLOPs")
    axes.set(title="Validation while training", xlabel="training FLOPs", ylabel="loss", xscale="log")
    axes.legend()
    note = f"After {found['flops']:.3g} training FLOPs, by the runs' own validations: {losses}."
    return f"{title}<p>{note}</p>{_svg(figure)}"


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return html.escape(f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value))

    lines = ["".join(f"<td>{cell(value)}</td>" for value in row) for row in rows]
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>\n"


def _svg(figure: Figure) -> str:
    """Return a figure as an element of the page; text stays text, and no date makes it differ from run to run."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "evaluation"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    # The document type and the metadata name addresses elsewhere; the element alone needs neither.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return f"<figure>{svg}</figure>\n"
