"""Compact states keep what softmax sees, and the buffer is a reproducible first-in-first-out store of them."""

import io
import itertools
import math

import pytest
import torch

from ebwm_dist.config.schema import MCMCConfig
from ebwm_dist.mcmc.replay import (
    ReplayBuffer,
    compress_logits,
    expand_logits,
    reshard,
)

B, S, V = 3, 5, 300


@pytest.fixture
def logits():
    return 4 * torch.randn(B, S, V, generator=torch.Generator().manual_seed(0)) + 100


def expanded(logits, keep):
    return expand_logits(compress_logits(logits, keep), logits.shape[-1], logits.dtype)


def test_kept_tokens_and_the_mass_of_the_rest_are_preserved(logits):
    p, q = logits.softmax(-1), expanded(logits, 20).softmax(-1)
    kept = logits.topk(20).indices
    torch.testing.assert_close(q.gather(-1, kept), p.gather(-1, kept), rtol=2e-2, atol=0)
    rest_p, rest_q = (x.scatter(-1, kept, 0.0) for x in (p, q))
    torch.testing.assert_close(rest_q.sum(-1), rest_p.sum(-1), rtol=2e-2, atol=0)
    assert all(len(row[row > 0].unique()) == 1 for row in rest_q.flatten(0, 1))  # shared evenly


def test_mass_of_a_tiny_rest_is_not_lost():
    """A rest of 1e-9 vanishes in the sum of all, which is 1."""
    logits = torch.full((1, 1, V), -27.0)
    logits[..., 7] = 0
    q = expanded(logits, 4).double().softmax(-1)
    expected = logits.double().softmax(-1)
    torch.testing.assert_close(q, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("keep", [V, V + 1, 10 * V])
def test_all_kept_is_exact_to_rounding(logits, keep):
    wanted = (logits - logits.amax(-1, keepdim=True)).half().float()
    assert torch.equal(expanded(logits, keep), wanted)


def test_a_shift_changes_nothing(logits):
    logits = logits.round()
    one, two = compress_logits(logits, 8), compress_logits(logits + 1024, 8)
    assert torch.equal(one["indices"], two["indices"]) and torch.equal(one["values"], two["values"])
    assert one["values"].max() == 0 and one["values"][..., 0].min() == 0
    torch.testing.assert_close(one["rest"], two["rest"], rtol=0, atol=1e-2)


def test_slices_of_positions_join(logits):
    whole = compress_logits(logits, 8)
    parts = [compress_logits(logits[:, i : i + 2], 8) for i in range(0, S, 2)]
    assert all(torch.equal(torch.cat([part[name] for part in parts], 1), whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, torch.int16), (50_277, torch.int16), (65_536, torch.int16), (65_537, torch.int32)]
)
def test_every_index_survives(vocab_size, dtype):
    best = torch.tensor([0, 1, 32_767, 32_768, vocab_size - 1]) % vocab_size
    logits = torch.zeros(1, len(best), vocab_size)
    logits[0, range(len(best)), best] = 9
    compact = compress_logits(logits, 2)
    assert compact["indices"].dtype == dtype
    assert torch.equal(expand_logits(compact, vocab_size, torch.float32).argmax(-1)[0], best)


def test_impossible_tokens_stay_impossible_and_finite():
    logits = torch.full((1, 2, 10), -math.inf)
    logits[0, 0, 3] = 5
    logits[0, 1, 2:5] = torch.tensor([-1e9, 5.0, 5.0])
    for keep in (1, 2, 10):
        q = expanded(logits, keep)
        assert q.isfinite().all()
        assert torch.equal(q.softmax(-1)[0, 0], torch.eye(10)[3])
    assert expanded(logits, 3).softmax(-1)[0, 1].tolist() == [0, 0, 0, 0.5, 0.5, 0, 0, 0, 0, 0]


def test_dtype_of_the_expansion(logits):
    assert expand_logits(compress_logits(logits.bfloat16(), 8), V, torch.float64).dtype == torch.float64


def records(first, count):
    """Return records whose numbers follow from their ids."""
    ids = torch.arange(first, first + count)
    observed = ids[:, None] * 10 + torch.arange(S + 1)
    return observed, ids, {"embeddings": ids[:, None, None].expand(-1, S, 2).half()}


def filled(capacity, count):
    buffer = ReplayBuffer(capacity)
    buffer.push(*records(0, count))
    return buffer


def held(buffer):
    return buffer.state_dict()["sample_ids"].tolist()


def test_first_in_first_out():
    buffer = filled(5, 3)
    assert held(buffer) == [0, 1, 2]
    buffer.push(*records(3, 3))
    assert len(buffer) == 5 and held(buffer) == [1, 2, 3, 4, 5]
    buffer.push(*records(6, 9))
    assert held(buffer) == [10, 11, 12, 13, 14]


def test_samples_belong_together_and_are_different():
    buffer = filled(50, 40)
    observed, ids, state = buffer.take(30, seed=1)
    originals = observed[:, 0] // 10
    assert len(set(originals.tolist())) == 30
    assert torch.equal(observed, originals[:, None] * 10 + torch.arange(S + 1))
    assert torch.equal(state["embeddings"], originals[:, None, None].expand(-1, S, 2).half())
    assert ids.dtype == torch.int64 and len(set(ids.tolist())) == 30
    assert ids.min() > 2**32  # fresh ones, far from those pushed


def test_what_is_drawn_leaves_the_buffer():
    buffer = filled(8, 8)
    observed, _, _ = buffer.take(3, seed=1)
    assert sorted([*(observed[:, 0] // 10).tolist(), *held(buffer)]) == list(range(8))
    assert held(buffer) == sorted(held(buffer))


def test_too_few_records_give_none():
    assert ReplayBuffer(4).take(1, 0) is None
    assert filled(4, 2).take(3, 0) is None
    assert filled(4, 3).take(3, 0) is not None


def assert_same(one, two):
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert one[2].keys() == two[2].keys() and all(torch.equal(one[2][name], two[2][name]) for name in one[2])


def test_sample_is_a_function_of_content_and_seed():
    one = filled(8, 8).take(4, 5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert_same(filled(8, 8).take(4, 5), one)
    assert torch.equal(torch.get_rng_state(), before)
    others = [filled(8, 8).take(8, seed) for seed in range(20)]
    assert len({tuple(observed[:, 0].tolist()) for observed, _, _ in others}) == 20
    by_record = [dict(zip(observed[:, 0].tolist(), ids.tolist(), strict=True)) for observed, ids, _ in others]
    assert len({mapping[0] for mapping in by_record}) == 20  # the same record gets another id each time


def test_every_record_is_drawn_alike():
    counts = torch.zeros(8)
    for seed in range(400):
        counts[filled(8, 8).take(2, seed)[0][:, 0] // 10] += 1
    assert (counts - 100).abs().max() < 6 * (100 * 0.75) ** 0.5


def test_resumes_exactly():
    buffer = filled(6, 9)
    stream = io.BytesIO()
    torch.save(buffer.state_dict(), stream)
    stream.seek(0)
    other = filled(6, 2)
    other.load_state_dict(torch.load(stream, weights_only=True))
    for seed in range(3):
        assert_same(other.take(2, seed), buffer.take(2, seed))
        for each in (buffer, other):
            each.push(*records(20 + seed, 1))


def test_empty_buffer_resumes():
    buffer = filled(4, 2)
    buffer.load_state_dict(ReplayBuffer(4).state_dict())
    assert len(buffer) == 0


@pytest.mark.parametrize(("capacity", "ids"), [(2, [4, 5]), (9, [2, 3, 4, 5])])
def test_another_capacity_keeps_the_newest(capacity, ids):
    buffer = ReplayBuffer(capacity)
    buffer.load_state_dict(filled(4, 6).state_dict())
    assert held(buffer) == ids


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_states_that_are_not_finite_do_not_enter(logits, bad):
    logits[1, 2, 250] = bad
    buffer = ReplayBuffer(4)
    buffer.push(torch.zeros(B, S + 1, dtype=torch.int64), torch.arange(B), compress_logits(logits, 8))
    assert held(buffer) == [0, 2]
    state = torch.zeros(B, S, 4)
    state[0, 4, 1] = bad
    state[2, 0, 0] = 1e5  # beyond float16
    buffer.push(torch.zeros(B, S + 1, 4), 10 + torch.arange(B), {"embeddings": state.half()})
    assert len(buffer) == 3


def test_a_position_without_any_possible_token_does_not_enter(logits):
    logits[2, 0] = -math.inf
    buffer = ReplayBuffer(4)
    buffer.push(torch.zeros(B, S + 1, dtype=torch.int64), torch.arange(B), compress_logits(logits, V))
    assert held(buffer) == [0, 1]


def test_records_do_not_hold_on_to_their_batch():
    buffer = ReplayBuffer(4)
    observed, ids, state = records(0, 100)
    buffer.push(observed, ids, state)
    for row, sample_id, compact in buffer._records:
        for tensor in (row, sample_id, *compact.values()):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    observed.zero_()
    assert buffer.take(4, 0)[0].min() > 0


def test_bytes_of_a_record():
    """256 positions and a vocabulary of 50,277: whole, that is 51 MB."""
    compact = compress_logits(torch.randn(1, 256, 50_277), MCMCConfig().replay_top_k)
    assert sum(tensor.nbytes for tensor in compact.values()) == 256 * (1024 * (2 + 2) + 2) == 1_049_088


def holding(capacity, ids):
    buffer = ReplayBuffer(capacity)
    ids = torch.tensor(ids, dtype=torch.int64)
    buffer.push(ids[:, None] + torch.arange(4), ids, {"embeddings": ids[:, None].half()})
    return buffer


def test_records_are_resharded_to_another_number_of_ranks():
    """None is lost or doubled while there is room; then the oldest of all ranks go first."""
    states = [holding(4, ids).state_dict() for ids in ([11, 12, 13, 14], [], [31, 32, 33])]
    for world_size in (1, 2, 3, 5, 9):
        parts = [reshard(states, rank, world_size) for rank in range(world_size)]
        found = [part["sample_ids"].tolist() if part else [] for part in parts]
        assert sorted(itertools.chain(*found)) == [11, 12, 13, 14, 31, 32, 33]
        assert max(map(len, found)) - min(map(len, found)) <= 1
        for part in filter(None, parts):
            assert torch.equal(part["observed"], part["sample_ids"][:, None] + torch.arange(4))
            assert torch.equal(part["state"]["embeddings"], part["sample_ids"][:, None].half())
    buffer = ReplayBuffer(4)
    buffer.load_state_dict(reshard(states, 0, 1))
    assert buffer.state_dict()["sample_ids"].tolist() == [13, 32, 14, 33]
    buffer.load_state_dict(reshard([{}, {}], 0, 1))
    assert len(buffer) == 0
