"""Triton kernels of the candidates' attention; `fused_attention.py` launches them and holds the formulas.

Every program takes a block of candidates or of context keys of one head of one row, and holds no more than a block of
scores. With TANGENT, what candidates have is stacked along the batch: the tangent of a row lies `batch` rows behind it.

Sums are in the type of `stats`: float32, or float64 for tensors in it.

Names: a, b are the cotangents of outputs and of their tangents; ds, mu: tangents of scores, and their mean under the
softmax; e, f: the gradients of scores and of their tangents. Logarithms are to base 2.

Shapes: M candidates and N keys in a block, D head width padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SCAN = tl.constexpr(1024)
"""Candidates that are looked at together to find the first one that sees a key."""


@triton.jit
def _at(pointer, row, head, place, width, stride_b, stride_h, stride_s):  # type: ignore[no-untyped-def]
    """Return pointers [len(place), len(width)] into [B, H, S, d], whose last stride is 1."""
    return pointer + row * stride_b + head * stride_h + place[:, None].to(tl.int64) * stride_s + width[None, :]


@triton.jit
def _factor(x, dtype, precision: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return `x` as the factor of a product; tensor cores would cut off what TF32 does not hold, so it is rounded."""
    x = x.to(dtype)
    if precision == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _load(pointers, mask, precision: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(pointers, mask=mask, other=0.0)
    return _factor(x, x.dtype, precision)


@triton.jit(do_not_specialize=["seen_b", "batch", "heads", "size", "length"])
def forward(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, seen_ptr, o_ptr, stats_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, keys_b, keys_h, keys_s, values_b, values_h, values_s,
    seen_b, o_b, o_h, o_s, batch, heads, size, length,
    WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SCALE: tl.constexpr, TANGENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the outputs [(2)B, H, S, d] and stats: the log-sum-exp, and with a tangent mu, [(2), B, H, S]."""
    # Programs of a head stand together; the last candidates see most, so they start first.
    count = tl.cdiv(size, M)
    block, program = count - 1 - tl.program_id(0) % count, tl.program_id(0) // count
    row, head = (program // heads).to(tl.int64), program % heads
    wide: tl.constexpr = stats_ptr.dtype.element_ty
    m, d = block * M + tl.arange(0, M), tl.arange(0, D)
    exists = m < size
    inside = exists[:, None] & (d < WIDTH)[None, :]
    seen = tl.minimum(tl.load(seen_ptr + row * seen_b + m, mask=exists, other=0).to(tl.int32), length)
    q = tl.load(_at(q_ptr, row, head, m, d, q_b, q_h, q_s), mask=inside, other=0.0)
    k = tl.load(_at(k_ptr, row, head, m, d, k_b, k_h, k_s), mask=inside, other=0.0).to(wide)
    v = tl.load(_at(v_ptr, row, head, m, d, v_b, v_h, v_s), mask=inside, other=0.0).to(wide)

    # The softmax starts from the candidate's own key, so there is always one.
    top = tl.sum(q.to(wide) * k, 1) * (SCALE * LOG2E)
    total = tl.full([M], 1.0, wide)
    o = v
    if TANGENT:
        dq = tl.load(_at(q_ptr, batch + row, head, m, d, q_b, q_h, q_s), mask=inside, other=0.0)
        dk = tl.load(_at(k_ptr, batch + row, head, m, d, k_b, k_h, k_s), mask=inside, other=0.0).to(wide)
        dv = tl.load(_at(v_ptr, batch + row, head, m, d, v_b, v_h, v_s), mask=inside, other=0.0).to(wide)
        mu = tl.sum(dq.to(wide) * k + q.to(wide) * dk, 1) * SCALE
        do = mu[:, None] * v + dv

    q = _factor(q, q.dtype, PRECISION)
    if TANGENT:
        dq = _factor(dq, dq.dtype, PRECISION)
    for start in range(0, tl.max(seen, 0), N):
        n = start + tl.arange(0, N)
        valid = (n < length)[:, None] & (d < WIDTH)[None, :]
        keys = _load(_at(keys_ptr, row, head, n, d, keys_b, keys_h, keys_s), valid, PRECISION)
        values = _load(_at(values_ptr, row, head, n, d, values_b, values_h, values_s), valid, PRECISION)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (SCALE * LOG2E)
        scores = tl.where(n[None, :] < seen[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        top = new_top
        total = total * shrink + tl.sum(p, 1)
        o = tl.dot(_factor(p, values.dtype, PRECISION), values, o * shrink[:, None], input_precision=PRECISION)
        if TANGENT:
            w = p * (tl.dot(dq, tl.trans(keys), input_precision=PRECISION) * SCALE)
            mu = mu * shrink + tl.sum(w, 1)
            do = tl.dot(_factor(w, values.dtype, PRECISION), values, do * shrink[:, None], input_precision=PRECISION)

    o = o / total[:, None]
    tl.store(_at(o_ptr, row, head, m, d, o_b, o_h, o_s), o.to(o_ptr.dtype.element_ty), mask=inside)
    stats_at = stats_ptr + program.to(tl.int64) * size + m
    tl.store(stats_at, top + tl.log2(total), mask=exists)
    if TANGENT:
        mu = mu / total
        do = do / total[:, None] - mu[:, None] * o
        tl.store(_at(o_ptr, batch + row, head, m, d, o_b, o_h, o_s), do.to(o_ptr.dtype.element_ty), mask=inside)
        tl.store(stats_at + batch.to(tl.int64) * heads * size, mu, mask=exists)


@triton.jit(do_not_specialize=["seen_b", "batch", "heads", "size", "length"])
def backward_candidates(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, seen_ptr, o_ptr, a_ptr, stats_ptr,
    gq_ptr, gk_ptr, gv_ptr, sums_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, keys_b, keys_h, keys_s, values_b, values_h, values_s,
    seen_b, o_b, o_h, o_s, a_b, a_h, a_s, batch, heads, size, length,
    WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SCALE: tl.constexpr, TANGENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of q, k, v, laid out as the outputs are, and the sums eta, beta [(2), B, H, S]."""
    count = tl.cdiv(size, M)
    block, program = count - 1 - tl.program_id(0) % count, tl.program_id(0) // count
    row, head = (program // heads).to(tl.int64), program % heads
    wide: tl.constexpr = stats_ptr.dtype.element_ty
    m, d = block * M + tl.arange(0, M), tl.arange(0, D)
    exists = m < size
    inside = exists[:, None] & (d < WIDTH)[None, :]
    seen = tl.minimum(tl.load(seen_ptr + row * seen_b + m, mask=exists, other=0).to(tl.int32), length)
    q = tl.load(_at(q_ptr, row, head, m, d, q_b, q_h, q_s), mask=inside, other=0.0)
    a = tl.load(_at(a_ptr, row, head, m, d, a_b, a_h, a_s), mask=inside, other=0.0)
    k = tl.load(_at(k_ptr, row, head, m, d, k_b, k_h, k_s), mask=inside, other=0.0).to(wide)
    v = tl.load(_at(v_ptr, row, head, m, d, v_b, v_h, v_s), mask=inside, other=0.0).to(wide)
    o = tl.load(_at(o_ptr, row, head, m, d, o_b, o_h, o_s), mask=inside, other=0.0).to(wide)
    stats_at = program.to(tl.int64) * size + m
    second = batch.to(tl.int64) * heads * size
    lse = tl.load(stats_ptr + stats_at, mask=exists, other=0.0)
    gradient_at = _at(0, row, head, m, d, o_b, o_h, o_s)
    dtype = gq_ptr.dtype.element_ty

    wide_q, wide_a = q.to(wide), a.to(wide)
    own_p = tl.exp2(tl.sum(wide_q * k, 1) * (SCALE * LOG2E) - lse)
    eta = tl.sum(wide_a * o, 1)
    own = tl.sum(wide_a * v, 1)
    if TANGENT:
        tangent_at = _at(0, batch + row, head, m, d, o_b, o_h, o_s)
        dq = tl.load(_at(q_ptr, batch + row, head, m, d, q_b, q_h, q_s), mask=inside, other=0.0)
        b = tl.load(_at(a_ptr, batch + row, head, m, d, a_b, a_h, a_s), mask=inside, other=0.0)
        dk = tl.load(_at(k_ptr, batch + row, head, m, d, k_b, k_h, k_s), mask=inside, other=0.0).to(wide)
        dv = tl.load(_at(v_ptr, batch + row, head, m, d, v_b, v_h, v_s), mask=inside, other=0.0).to(wide)
        do = tl.load(_at(o_ptr, batch + row, head, m, d, o_b, o_h, o_s), mask=inside, other=0.0).to(wide)
        mu = tl.load(stats_ptr + second + stats_at, mask=exists, other=0.0)
        wide_dq, wide_b = dq.to(wide), b.to(wide)
        own_ds = tl.sum(wide_dq * k + wide_q * dk, 1) * SCALE - mu
        beta = tl.sum(wide_b * o, 1)
        eta += tl.sum(wide_b * do, 1)
        own_b = tl.sum(wide_b * v, 1) - beta
        own_f = own_p * own_b
        own_e = own_p * (own + tl.sum(wide_b * dv, 1) + own_ds * own_b - eta)
        gk = own_e[:, None] * wide_q + own_f[:, None] * wide_dq
        gv = own_p[:, None] * (wide_a + own_ds[:, None] * wide_b)
        gq = own_e[:, None] * k + own_f[:, None] * dk
        gdq = own_f[:, None] * k
        tl.store(gk_ptr + tangent_at, (SCALE * own_f[:, None] * wide_q).to(dtype), mask=inside)
        tl.store(gv_ptr + tangent_at, (own_p[:, None] * wide_b).to(dtype), mask=inside)
        tl.store(sums_ptr + second + stats_at, beta, mask=exists)
    else:
        own_e = own_p * (own - eta)
        gk = own_e[:, None] * wide_q
        gv = own_p[:, None] * wide_a
        gq = own_e[:, None] * k
    tl.store(gk_ptr + gradient_at, (SCALE * gk).to(dtype), mask=inside)
    tl.store(gv_ptr + gradient_at, gv.to(dtype), mask=inside)
    tl.store(sums_ptr + stats_at, eta, mask=exists)

    q, a = _factor(q, q.dtype, PRECISION), _factor(a, a.dtype, PRECISION)
    if TANGENT:
        dq, b = _factor(dq, dq.dtype, PRECISION), _factor(b, b.dtype, PRECISION)
    for start in range(0, tl.max(seen, 0), N):
        n = start + tl.arange(0, N)
        valid = (n < length)[:, None] & (d < WIDTH)[None, :]
        keys = _load(_at(keys_ptr, row, head, n, d, keys_b, keys_h, keys_s), valid, PRECISION)
        values = _load(_at(values_ptr, row, head, n, d, values_b, values_h, values_s), valid, PRECISION)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (SCALE * LOG2E)
        p = tl.where(n[None, :] < seen[:, None], tl.exp2(scores - lse[:, None]), 0.0)
        e = tl.dot(a, tl.trans(values), input_precision=PRECISION) - eta[:, None]
        if TANGENT:
            f = tl.dot(b, tl.trans(values), input_precision=PRECISION) - beta[:, None]
            e += (tl.dot(dq, tl.trans(keys), input_precision=PRECISION) * SCALE - mu[:, None]) * f
            gdq = tl.dot(_factor(p * f, keys.dtype, PRECISION), keys, gdq, input_precision=PRECISION)
        gq = tl.dot(_factor(p * e, keys.dtype, PRECISION), keys, gq, input_precision=PRECISION)

    tl.store(gq_ptr + gradient_at, (SCALE * gq).to(dtype), mask=inside)
    if TANGENT:
        tl.store(gq_ptr + tangent_at, (SCALE * gdq).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["seen_b", "batch", "heads", "size", "length"])
def backward_context(  # type: ignore[no-untyped-def]
    q_ptr, keys_ptr, values_ptr, seen_ptr, a_ptr, stats_ptr, sums_ptr, gkeys_ptr, gvalues_ptr,
    q_b, q_h, q_s, keys_b, keys_h, keys_s, values_b, values_h, values_s,
    seen_b, a_b, a_h, a_s, g_b, g_h, g_s, batch, heads, size, length,
    WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SCALE: tl.constexpr, TANGENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients [B, H, T, d] of keys and values, from stats and what `backward_candidates` has summed."""
    count = tl.cdiv(length, N)
    block, program = tl.program_id(0) % count, tl.program_id(0) // count
    row, head = (program // heads).to(tl.int64), program % heads
    wide: tl.constexpr = stats_ptr.dtype.element_ty
    n, d = block * N + tl.arange(0, N), tl.arange(0, D)
    valid = (n < length)[:, None] & (d < WIDTH)[None, :]
    keys = _load(_at(keys_ptr, row, head, n, d, keys_b, keys_h, keys_s), valid, PRECISION)
    values = _load(_at(values_ptr, row, head, n, d, values_b, values_h, values_s), valid, PRECISION)
    gkeys, gvalues = tl.zeros([N, D], wide), tl.zeros([N, D], wide)
    second = batch.to(tl.int64) * heads * size

    # The candidates before the first that sees any of these keys add nothing, in whatever order candidates stand.
    first = size
    for start in range(0, size, SCAN):
        m = start + tl.arange(0, SCAN)
        seen = tl.load(seen_ptr + row * seen_b + m, mask=m < size, other=0).to(tl.int32)
        first = tl.minimum(first, tl.min(tl.where(seen > block * N, m, size), 0))

    for start in range(first // M * M, size, M):
        m = start + tl.arange(0, M)
        exists = m < size
        inside = exists[:, None] & (d < WIDTH)[None, :]
        seen = tl.load(seen_ptr + row * seen_b + m, mask=exists, other=0).to(tl.int32)
        q = _load(_at(q_ptr, row, head, m, d, q_b, q_h, q_s), inside, PRECISION)
        a = _load(_at(a_ptr, row, head, m, d, a_b, a_h, a_s), inside, PRECISION)
        stats_at = program.to(tl.int64) * size + m
        lse = tl.load(stats_ptr + stats_at, mask=exists, other=0.0)
        eta = tl.load(sums_ptr + stats_at, mask=exists, other=0.0)
        scores = tl.dot(keys, tl.trans(q), input_precision=PRECISION) * (SCALE * LOG2E)
        p = tl.where(n[:, None] < seen[None, :], tl.exp2(scores - lse[None, :]), 0.0)
        e = tl.dot(values, tl.trans(a), input_precision=PRECISION) - eta[None, :]
        gvalues = tl.dot(_factor(p, a.dtype, PRECISION), a, gvalues, input_precision=PRECISION)
        if TANGENT:
            dq = _load(_at(q_ptr, batch + row, head, m, d, q_b, q_h, q_s), inside, PRECISION)
            b = _load(_at(a_ptr, batch + row, head, m, d, a_b, a_h, a_s), inside, PRECISION)
            mu = tl.load(stats_ptr + second + stats_at, mask=exists, other=0.0)
            beta = tl.load(sums_ptr + second + stats_at, mask=exists, other=0.0)
            ds = tl.dot(keys, tl.trans(dq), input_precision=PRECISION) * SCALE - mu[None, :]
            f = tl.dot(values, tl.trans(b), input_precision=PRECISION) - beta[None, :]
            gvalues = tl.dot(_factor(p * ds, b.dtype, PRECISION), b, gvalues, input_precision=PRECISION)
            gkeys = tl.dot(_factor(p * f, dq.dtype, PRECISION), dq, gkeys, input_precision=PRECISION)
            e += ds * f
        gkeys = tl.dot(_factor(p * e, q.dtype, PRECISION), q, gkeys, input_precision=PRECISION)

    dtype = gkeys_ptr.dtype.element_ty
    tl.store(_at(gkeys_ptr, row, head, n, d, g_b, g_h, g_s), (SCALE * gkeys).to(dtype), mask=valid)
    tl.store(_at(gvalues_ptr, row, head, n, d, g_b, g_h, g_s), gvalues.to(dtype), mask=valid)
