"""The candidates' attention without a matrix of positions and context, by Triton kernels.

Candidate i attends to the n_i first keys K of the context and to its own key k, in one softmax. With scores
s = c q.K (c q.k for its own), tangents ds = c dq.K (c (dq.k + q.dk)), and p = softmax(s) over all of them:

    mu = sum p ds        o = sum p V        do = sum p (ds - mu) V + p_own dv

The softmax is built up block by block from the candidate's own key on, with o, sum p ds V and mu beside it, so that
memory grows with the positions only; do = sum p ds V + p_own dv - mu o. For cotangents a of o and b of do let

    A = a.V (its own: a.v + b.dv)    B = b.V    beta = b.o    eta = a.o + b.do

Then the gradients of scores and of their tangents are

    e = p (A + (ds - mu) (B - beta) - eta)        f = p (B - beta)

(the mean under p of what stands in e before eta is eta, and that of B is beta), and from them

    q:  c (sum e K + e_own k + f_own dk)    dq: c (sum f K + f_own k)
    k:  c (e_own q + f_own dq)              dk: c f_own q
    v:  p_own (a + (ds_own - mu) b)         dv: p_own b
    K:  c sum_i (e q + f dq)                V:  sum_i p (a + (ds - mu) b)

p is computed again from the log-sum-exp. Without a tangent, ds, b and f are zero. These are first derivatives: nothing
can be differentiated twice through them, and the engine need not.

Shapes: B batch, H heads, S candidates, T keys of the context, d head width. With a tangent, q, k, v and the output hold
values and tangents stacked along the batch [2B, H, S, d].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MAX_HEAD_WIDTH = 128


def why_unavailable(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Return why the kernels cannot be used, or None: they are compiled and run once, so that is known from then on."""
    if head_width > MAX_HEAD_WIDTH:
        return f"the kernels take heads up to {MAX_HEAD_WIDTH} wide, these are {head_width}"
    if device.type != "cuda":
        return f"the kernels run on CUDA, not on the {device.type.upper()}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    try:
        for tangent in (False, True):
            x = torch.zeros(1 + tangent, 1, 16, head_width, device=device, dtype=dtype, requires_grad=True)
            keys = x[:1].detach().requires_grad_(tangent)
            seen = torch.arange(1, 17, device=device)
            attend_fused(x, x, x, keys, keys, seen, tangent).sum().backward()
        torch.cuda.synchronize(device)
    except Exception as error:  # a compiler may fail in any way
        return f"Triton fails on {torch.cuda.get_device_name(device)} with {type(error).__name__}: {error}"
    return None


def attend_fused(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, seen: Tensor, tangent: bool) -> Tensor:
    """Return what `attend_by_matrices` returns, from the same arguments."""
    output, _ = _forward(q, k, v, keys, values, seen, tangent)
    return output


@torch.library.custom_op("ebwm_dist::candidate_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, seen: Tensor, tangent: bool
) -> tuple[Tensor, Tensor]:
    from ebwm_dist.models.attention_kernels import forward

    q, k, v, keys, values = map(_dense, (q, k, v, keys, values))
    output, stats = _empty_output(q), _empty_stats(q, keys)
    tensors, strides = (q, k, v, keys, values), [x.stride()[:3] for x in (q, k, v, keys, values)]
    sizes, meta = _arguments(q, keys, tangent, "forward")
    grid = (keys.shape[0] * keys.shape[1] * _blocks(q.shape[2], meta["M"]),)
    with torch.cuda.device_of(q):
        forward[grid](
            *tensors, seen, output, stats, *sum(strides, ()), _row_stride(seen), *output.stride()[:3], *sizes, **meta
        )
    return output, stats


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, seen: Tensor, tangent: bool
) -> tuple[Tensor, Tensor]:
    return _empty_output(q), _empty_stats(q, keys)


@torch.library.custom_op("ebwm_dist::candidate_attention_backward", mutates_args=())
def _backward(
    a: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    output: Tensor,
    stats: Tensor,
    tangent: bool,
    context: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ebwm_dist.models.attention_kernels import backward_candidates, backward_context

    a, q, k, v, keys, values = map(_dense, (a, q, k, v, keys, values))
    gq, gk, gv, stats = _empty_output(q), _empty_output(q), _empty_output(q), stats.contiguous()
    sums = torch.empty_like(stats)
    if output.stride() != gq.stride():  # whoever kept it has laid it out in another way
        output = _empty_output(q).copy_(output)
    gkeys, gvalues = _empty_context(keys, context), _empty_context(keys, context)
    rows = keys.shape[0] * keys.shape[1]
    strides = [x.stride()[:3] for x in (q, k, v, keys, values)]
    with torch.cuda.device_of(q):
        sizes, meta = _arguments(q, keys, tangent, "candidates")
        backward_candidates[(rows * _blocks(q.shape[2], meta["M"]),)](
            q, k, v, keys, values, seen, output, a, stats, gq, gk, gv, sums, *sum(strides, ()),
            _row_stride(seen), *output.stride()[:3], *a.stride()[:3], *sizes, **meta,
        )  # fmt: skip
        if context:
            sizes, meta = _arguments(q, keys, tangent, "context")
            strides = [x.stride()[:3] for x in (q, keys, values)]
            backward_context[(rows * _blocks(keys.shape[2], meta["N"]),)](
                q, keys, values, seen, a, stats, sums, gkeys, gvalues, *sum(strides, ()),
                _row_stride(seen), *a.stride()[:3], *gkeys.stride()[:3], *sizes, **meta,
            )  # fmt: skip
    return gq, gk, gv, gkeys, gvalues


@_backward.register_fake
def _(
    a: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    output: Tensor,
    stats: Tensor,
    tangent: bool,
    context: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = _empty_output
    return like(q), like(q), like(q), _empty_context(keys, context), _empty_context(keys, context)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.tangent = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, a: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    context = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    gradients = _backward(a, *ctx.saved_tensors, ctx.tangent, context)
    return *gradients[:3], *(gradients[3:] if context else (None, None)), None, None


_forward.register_autograd(_differentiate, setup_context=_setup)


def _dense(x: Tensor) -> Tensor:
    """Return `x` with a last stride of 1, which the kernels count on."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_output(q: Tensor) -> Tensor:
    """Return [B, H, S, d] that lies in memory as [B, S, H, d], which linear layers take as it is."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _empty_context(keys: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(keys, memory_format=torch.contiguous_format) if needed else keys.new_empty(0)


def _empty_stats(q: Tensor, keys: Tensor) -> Tensor:
    """Return room for one number, or with a tangent two, of each candidate and head."""
    shape = (q.shape[0] // keys.shape[0], keys.shape[0], q.shape[1], q.shape[2])
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _row_stride(seen: Tensor) -> int:
    return 0 if seen.dim() == 1 else seen.stride(0)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _arguments(q: Tensor, keys: Tensor, tangent: bool, kernel: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the sizes that every kernel takes, and how it is compiled."""
    (batch, heads, length, width), size = keys.shape, q.shape[2]
    padded = max(16, 1 << (width - 1).bit_length())
    precision = _precision(q.dtype)
    meta = {"WIDTH": width, "D": padded, "SCALE": 1 / math.sqrt(width), "TANGENT": tangent, "PRECISION": precision}
    return (batch, heads, size, length), meta | blocks(kernel, padded, precision)


def _precision(dtype: torch.dtype) -> str:
    """Return how products are computed: those of float32 as torch is told to, by TF32 once or by three products."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


BLOCKS = {
    ("ieee", 64): {"forward": (64, 64, 4, 2), "candidates": (64, 64, 4, 2), "context": (32, 64, 4, 2)},
    ("ieee", 128): {"forward": (64, 32, 4, 2), "candidates": (64, 64, 8, 2), "context": (32, 32, 4, 2)},
    ("tf32", 64): {"forward": (64, 32, 4, 2), "candidates": (32, 32, 4, 2), "context": (32, 32, 8, 2)},
    ("tf32", 128): {"forward": (32, 32, 8, 2), "candidates": (32, 32, 8, 2), "context": (32, 32, 8, 2)},
    ("tf32x3", 64): {"forward": (64, 32, 4, 1), "candidates": (16, 32, 4, 1), "context": (32, 16, 8, 1)},
    ("tf32x3", 128): {"forward": (16, 16, 4, 1), "candidates": (16, 16, 4, 1), "context": (16, 16, 4, 1)},
}
"""By precision and head width: candidates M and keys N of a block, warps, and stages of loading. Those of bfloat16, and
of TF32 at width 64, are the fastest that were tried on an H200 (Triton 3.6); the others spill least."""


def blocks(kernel: str, padded_width: int, precision: str) -> dict[str, int]:
    """Return how a kernel is cut into blocks."""
    sizes = BLOCKS[precision, 64 if padded_width <= 64 else 128][kernel]
    return dict(zip(("M", "N", "num_warps", "num_stages"), sizes, strict=True))
