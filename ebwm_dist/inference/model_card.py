"""The card of a model: what it is, what it was trained on, how well it does, and how to use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ebwm_dist import __version__
from ebwm_dist.config.schema import Config
from ebwm_dist.run import Run


def model_card(run: Run, name: str, parameters: int, precisions: list[str], license_: str | None) -> str:
    """Return README.md of a hub's folder: its fields for the hub, then text."""
    energy = run.config.model.kind == "ebt"
    fields = ["library_name: transformers", "pipeline_tag: text-generation"]
    fields += ["tags:", "- ebwm_dist", *(["- energy-based-transformer"] if energy else [])]
    if license_ is not None:
        fields.insert(0, f"license: {license_}")
    kind = "An energy-based transformer" if energy else "An autoregressive transformer"
    parts = [
        "\n".join(["---", *fields, "---"]),
        f"# {name}",
        f"{kind} of text, trained with ebwm_dist {__version__}."
        + (
            " It gives each pair of a context and a candidate next token an energy, and predicts by descending on it."
            if energy
            else ""
        ),
        _usage(name, run.config),
        "## Size and training",
        _table({"parameters": f"{parameters:,}", **_training(run)}),
    ]
    if (found := _evaluation(run)) is not None:
        parts += ["## Evaluation", "Held-out text, by `launchers/evaluate.py`.", _table(found)]
    parts.append(
        f"The weights are stored in {' and '.join(precisions)} and loaded in float32. Licence: "
        + (f"{license_}." if license_ is not None else "not stated by whoever exported the model.")
    )
    if run.tokenizer is None:
        parts.append("The model came without a tokenizer: token ids go in and out.")
    return "\n\n".join(parts) + "\n"


def _usage(name: str, config: Config) -> str:
    energy = config.model.kind == "ebt"
    # Without noise candidates would all be the same, and are refused.
    noise = config.mcmc.initial_state == "random_noise" or config.mcmc.langevin_noise > 0
    candidates = '"candidates": 4, ' if noise else ""
    thinking = f', thinking={{"steps": 8, {candidates}"energy_tolerance": 1e-3}}' if energy else ""
    lines = [
        "## Use",
        "",
        "The package ebwm_dist must be installed; the code in this folder only imports it.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        # Also where the tokenizer's class is one of transformers, which asks before it reads the model's configuration.
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)',
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
        'inputs = tokenizer("In the beginning", return_tensors="pt")',
        f"tokens = model.generate(**inputs, max_new_tokens=40{thinking})",
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
        "```",
    ]
    if energy:
        lines += [
            "",
            "`thinking` is how long and how often a token is refined; the default is in generation_config.json. "
            "`model.predictor` gives energies and steps. Predictions have no gradients: train with ebwm_dist.",
        ]
    return "\n".join(lines)


def _training(run: Run) -> dict[str, str]:
    config = run.config
    model = config.model
    rows = {
        "layers, width, heads": f"{model.num_layers}, {model.dim}, {model.num_heads}",
        "vocabulary": f"{model.vocab_size:,}",
        "context (tokens)": f"{config.data.sequence_length:,}",
    }
    if model.kind == "ebt":
        steps = config.mcmc.num_steps, config.mcmc.max_mcmc_steps
        rows["MCMC steps in training"] = str(steps[0]) if steps[0] == steps[1] else f"{steps[0]} to {steps[1]}"
    rows["optimizer steps"] = f"{run.step:,}" if run.step else "imported weights"
    trained = [record for record in run.records if record["kind"] == "train"]
    if trained:
        rows["tokens"] = f"{trained[-1]['tokens']:,}"
        rows["data"] = ", ".join(Path(str(path).rstrip("/")).name for path in config.data.mixture or [config.data.path])
    validated = [record for record in run.records if record["kind"] == "val" and record["loss_last_step"] is not None]
    if validated:
        rows["validation loss"] = f"{validated[-1]['loss_last_step']:.4f}"
    return rows


def _evaluation(run: Run) -> dict[str, str] | None:
    """Return figures of evaluation.json, if the run has been evaluated at the step of the model."""
    try:
        found: dict[str, Any] = json.loads((run.folder / "evaluation" / "evaluation.json").read_text("utf-8"))["model"]
        steps = found["by_steps"]
        if found["model"]["step"] != run.step:
            return None
        return {
            f"loss after {number} step{'s' if number > 1 else ''} (perplexity)": f"{loss:.4f} ({perplexity:.2f})"
            for number, loss, perplexity in zip(steps["steps"], steps["loss"], steps["perplexity"], strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
