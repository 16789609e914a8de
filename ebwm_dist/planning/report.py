"""A plan as people read it: the best settings, the memory of the best one, what was assumed; and a sweep over sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ebwm_dist.planning.machines import Cluster
from ebwm_dist.planning.memory import CUDA_CONTEXT, FRAGMENTATION, GIB
from ebwm_dist.planning.plan import LAUNCH_SECONDS, TIME_DIGITS, WRITE_BANDWIDTH, Estimate, Planner

SHOWN = 8
"""Settings that are shown."""
_COMPONENTS = ("weights", "gradients", "optimizer", "buckets", "context", "slice", "vocabulary", "fragmentation")


def describe(planner: Planner, cluster: Cluster, plans: Sequence[Estimate], calibrated: str | None = None) -> str:
    """Return the report on the settings `plans`, best first; `calibrated` names where the efficiency was measured."""
    machine, best, config = cluster.machine, plans[0], planner.config
    unit = f"{config.model.unit}s"
    fitting = sum(plan.fits for plan in plans)
    lines = [
        f"{config.model.kind} with {planner.parameters.total:,} parameters, {planner.tokens:.4g} {unit} in steps of "
        f"{planner.tokens_per_step:,}, on {cluster.gpus} x {machine.name} ({machine.memory / GIB:.0f} GiB each) on "
        f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}",
        f"{fitting} of {len(plans)} settings fit" + ("; the best:" if fitting else "; the nearest ones:"),
        "",
        *table(plans[:SHOWN], unit),
        "",
        f"memory per GPU of the first, in GiB: {_components(best)}",
        _checkpoint(planner, cluster, best),
        f"overrides: {best.setting.overrides()}",
        "",
        "assumed:",
        *(f"- {line}" for line in assumptions(planner, cluster, calibrated)),
    ]
    if not fitting:
        lines.insert(2, _what_would_fit(planner, cluster, plans))
    return "\n".join(lines)


def table(plans: Sequence[Estimate], unit: str) -> Iterator[str]:
    """Yield the lines of a table of settings."""
    yield (
        f"{'ZeRO':>4} {'micro':>5} {'accum':>5} {'chunk':>5} {'shared':>6} {'checkpoint':>10} {'GiB':>6} "
        f"{'s/step':>7} {'exchange':>8} {unit + '/s':>10} {'MFU %':>5} {'days':>8} {'GPU-hours':>10}"
    )
    for plan in plans:
        setting = plan.setting
        yield (
            f"{setting.zero_stage:4} {setting.micro_batch_size:5} {plan.accumulation:5} {setting.position_chunk:5} "
            f"{setting.position_parallel:6} {setting.activation_checkpointing:>10} {plan.memory.total / GIB:6.1f} "
            f"{plan.step_seconds:7.3g} {100 * plan.exchange_seconds / plan.step_seconds:6.1f} % "
            f"{plan.tokens_per_second:10,.0f} {100 * plan.mfu:5.1f} {plan.days:8.3g} {plan.gpu_hours:10,.0f}"
        )


def assumptions(planner: Planner, cluster: Cluster, calibrated: str | None) -> Iterator[str]:
    """Yield what the estimates rest on."""
    machine, precision = cluster.machine, planner.config.training.precision
    peak = machine.peak_flops / (1 if precision == "bf16" else 2)
    source = calibrated or "the most measured so far on a GPU; --calibration or --efficiency replaces it"
    yield (
        f"computation reaches {100 * planner.efficiency:.3g} % of {peak / 1e12:.0f} TFLOP/s ({source}), and launches "
        f"an operation in {LAUNCH_SECONDS * 1e6:.0f} us"
    )
    yield (
        f"{machine.link / 1e9:.0f} GB/s between the GPUs of a node, {machine.network / 1e9:.0f} GB/s from a node to "
        "others (--machines); the only exchange that computation hides is the reducing of stage 3"
    )
    yield (
        f"{100 * FRAGMENTATION:.0f} % of the memory is lost to fragmentation, {CUDA_CONTEXT / GIB:.1f} GiB are "
        "CUDA's and NCCL's own"
    )
    zero = planner.config.zero
    if zero.offload_optimizer or zero.offload_parameters:
        yield "copies to and from the host, and the optimizer's work there, are left out: it takes longer"
    yield (
        f"settings are sorted by {TIME_DIGITS} significant digits of the time of a step; of those that are equal, the "
        "ones without checkpointing, at the lowest ZeRO stage, with the fewest ranks that share positions come first"
    )
    yield (f"every node writes {WRITE_BANDWIDTH / 1e9:.0f} GB/s of a checkpoint; saves and validation are left out")


def _components(plan: Estimate) -> str:
    parts = [f"{name} {getattr(plan.memory, name) / GIB:.2f}" for name in _COMPONENTS if getattr(plan.memory, name)]
    host = f"; on the host {plan.memory.host / GIB:.2f}" if plan.memory.host else ""
    return ", ".join(parts) + f" = {plan.memory.total / GIB:.2f}{host}"


def _checkpoint(planner: Planner, cluster: Cluster, plan: Estimate) -> str:
    size, time = planner.checkpoint(plan.setting, cluster)
    return f"a checkpoint takes {size / GIB:.1f} GiB, written in {time:.0f} s beside the training"


def _what_would_fit(planner: Planner, cluster: Cluster, plans: Sequence[Estimate]) -> str:
    least = min(plan.memory.total for plan in plans) / GIB
    room = (cluster.machine.memory - CUDA_CONTEXT) / GIB
    remedy = "more GPUs, GPUs with more memory, or zero.offload_optimizer=true"
    return f"the least takes {least:.1f} of {room:.1f} GiB: {remedy}"


def sweep_table(rows: Sequence[tuple[str, int, Estimate]]) -> Iterator[str]:
    """Yield the days of every size by number of GPUs; `-` where it does not fit, or the batch cannot be divided."""
    gpus = sorted({number for _, number, _ in rows})
    cells = {(size, number): plan for size, number, plan in rows}
    yield "days by number of GPUs (-: does not fit, or the global batch cannot be divided)"
    yield f"{'':>10}" + "".join(f"{number:>10,}" for number in gpus)
    for size in dict.fromkeys(name for name, _, _ in rows):
        texts = []
        for number in gpus:
            plan = cells.get((size, number))
            days = f"{plan.days:.3g}" if plan is not None and plan.fits else "-"
            texts.append(f"{days:>10}")
        yield f"{size:>10}" + "".join(texts)


def draw_sweep(rows: Sequence[tuple[str, int, Estimate]], path: Path) -> None:
    """Draw days by GPUs, a line for each size that fits, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for size in dict.fromkeys(name for name, _, _ in rows):
        points = [(gpus, plan.days) for name, gpus, plan in rows if name == size and plan.fits]
        axes.plot(
            [gpus for gpus, _ in points], [days for _, days in points], "o-", label=size, linewidth=1, markersize=4
        )
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="days")
    ticks = sorted({gpus for _, gpus, _ in rows})
    axes.set_xticks(ticks, [f"{gpus:,}" for gpus in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Days of training, with the best setting that fits", loc="left", fontsize=11)
    axes.legend(title="parameters", frameon=False)
    figure.savefig(path, dpi=120)
