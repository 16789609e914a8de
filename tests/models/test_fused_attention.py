"""The fused attention of candidates: interpreted, compiled ahead of time, chosen, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from ebwm_dist.config.schema import Config, DataConfig, MCMCConfig, ModelConfig, TrainingConfig
from ebwm_dist.errors import ConfigError
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.models.candidate_attention import attend_by_matrices
from ebwm_dist.models.fused_attention import attend_fused, blocks, why_unavailable
from ebwm_dist.planning.footprint import FootprintModel
from ebwm_dist.training.attention import set_attention
from tests.mcmc.small_models import batch, build, gradients, settings
from tests.mcmc.test_devices import needs_gpu
from tests.models.candidate_attention import errors, inputs

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
KERNELS = {"forward": "forward", "candidates": "backward_candidates", "context": "backward_context"}
DTYPES = {"bf16": ("*bf16", torch.bfloat16, "ieee"), "fp32": ("*fp32", torch.float32, "tf32")}


@needs_triton
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted(marks: str) -> None:
    """In a process of its own, for which Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", marks, "tests/models/interpreted_attention.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def resources(kernel: str, width: int, dtype: str, architecture: int, tangent: bool) -> dict[str, int]:
    """Compile a kernel for a GPU that need not be there; return its registers, spilled bytes and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ebwm_dist.models import attention_kernels

    function, (pointer, _, precision) = getattr(attention_kernels, KERNELS[kernel]), DTYPES[dtype]
    sizes = blocks(kernel, width, precision)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"WIDTH": width, "D": width, "SCALE": width**-0.5, "TANGENT": tangent, "PRECISION": precision, **sizes}
    pointers = {"seen_ptr": "*i64", "stats_ptr": "*fp32", "sums_ptr": "*fp32"}
    signature, divisible = {}, {}
    for index, name in enumerate(function.arg_names):
        is_pointer = name.endswith("_ptr")
        kind = pointers.get(name, pointer) if is_pointer else "i32"
        signature[name] = "constexpr" if name in constants else kind
        if is_pointer or (re.search("_[bhs]$", name) and name != "seen_b"):
            divisible[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return found | {"shared": compiled.metadata.shared}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_next_to_nothing_is_spilled(
    kernel: str, architecture: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At head width 64, with a tangent, where most is held: to spill a few words costs less than smaller blocks."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = resources(kernel, 64, dtype, architecture, tangent=True)
    assert found["stack"] <= (128 if architecture > 80 else 512) and found["local"] == 0 and 0 < found["reg"] <= 255, (
        found
    )
    assert 0 < found["shared"] <= 99 * 1024, found  # what the smallest GPUs give a block


def configuration(**training: Any) -> Config:
    return Config(
        model=ModelConfig(vocab_size=50, dim=16, num_heads=2, num_layers=3),
        mcmc=MCMCConfig(num_steps=2, step_size=1.0, initial_state="zeros"),
        training=TrainingConfig(micro_batch_size=3, position_chunk=200, **training),
        data=DataConfig(sequence_length=200),
    )


def test_the_cpu_has_no_fused_attention() -> None:
    config, cpu = configuration(attention="fused"), torch.device("cpu")
    model = build_model(config, pad_id=0)
    with pytest.raises(ConfigError, match="training.attention = 'fused': the kernels run on CUDA, not on the CPU; use"):
        set_attention(config, model, cpu)
    for choice in ("auto", "math"):
        line = set_attention(configuration(attention=choice), model, cpu)
        assert line is not None and line.startswith(f"attention: math (training.attention = {choice}")
    assert model.transformer.blocks[0].attention.attend is not attend_fused
    twin = dataclasses.replace(config, model=dataclasses.replace(config.model, kind="ar"))
    assert set_attention(twin, model, cpu) is None


def test_heads_may_be_too_wide() -> None:
    reason = why_unavailable(torch.device("cuda"), torch.float32, 130)
    assert reason == "the kernels take heads up to 128 wide, these are 130"


def test_memory_of_a_dry_run_is_without_matrices() -> None:
    configs = [configuration(attention=name) for name in ("math", "fused")]
    by_matrices, fused = (FootprintModel(config).of(config).activations for config in configs)
    one_matrix = 4 * 3 * 2 * 200 * 200  # of a layer, of rows, heads, candidates and keys in float32
    assert fused < by_matrices - 5 * one_matrix


@needs_gpu
@pytest.mark.parametrize("tangent", [False, True], ids=["candidate", "tangent"])
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("precision", ["bf16", "high", "highest"])
@pytest.mark.parametrize("order", ["causal", "any"])
def test_kernels_on_a_gpu(order: str, precision: str, width: int, tangent: bool) -> None:
    """Errors against float64 are at most twice those of matrices in the same precision.

    By TF32 the largest of those: matrices have the candidates' own keys and values in float32.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "bf16" else precision)
    try:
        tensors, seen, cotangent = inputs((2, 3, 300, 333, width), tangent, order, dtype, "cuda")
        fused, expected = errors(tensors, seen, cotangent, tangent)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, error in fused.items():
        limit = 2 * (max(expected.values()) if precision == "high" else expected[name])
        assert error <= limit + 1e-7, f"{name}: {error}, by matrices {expected}"


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("variant", ["default", "time_embed", "adaln"])
def test_a_training_step_on_a_gpu(variant: str, compiled: bool) -> None:
    (observed, ids), mcmc = batch(4, 130), settings(step_size=0.5, initial_state="zeros")
    model = build(mcmc, variant, position_chunk=48).to("cuda")
    fused = deepcopy(model).float()
    fused.fuse_attention()
    if compiled:
        fused.compile_blocks()
    expected = model.training_step(observed.cuda(), ids, StepPlan(2)).loss.item()
    assert fused.training_step(observed.cuda(), ids, StepPlan(2)).loss.item() == pytest.approx(expected, rel=1e-4)
    wanted, found = gradients(model), gradients(fused)
    assert wanted.keys() == found.keys()
    norm = torch.nn.utils.get_total_norm(wanted.values()).item()
    for name, gradient in found.items():
        assert (gradient.double() - wanted[name]).norm().item() < 1e-3 * norm, name


@needs_gpu
def test_no_matrix_of_positions_and_context_is_made() -> None:
    shape, peaks = (1, 4, 4096, 4096, 64), []
    for function in ("fused", "matrices"):
        tensors, seen, cotangent = inputs(shape, True, "causal", torch.bfloat16, "cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = (attend_fused if function == "fused" else attend_by_matrices)(*tensors, seen, True)
        torch.autograd.grad(output, tensors, cotangent)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del output, tensors, cotangent
    matrix = 2 * 4 * 4096 * 4096
    assert peaks[0] < matrix / 2 < 4 * matrix < peaks[1], peaks
