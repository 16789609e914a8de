"""Which failures are restarted, how often and after what pause."""

from __future__ import annotations

import pickle

from ebwm_dist.cluster.recovery import Failure, RestartPolicy, WorkerError, describe, kind_of
from ebwm_dist.errors import CheckpointError, ConfigError, DataError, FetchError, PeerError

NODES = {0: "host, node a", 1: "host, node b"}


def failure(kind: str = "lost", step: int = 7, cause: str = "lost rank 1") -> Failure:
    return Failure(step, kind, cause, cause, cause)


def test_the_first_cause_is_told_and_not_its_echo() -> None:
    gone = RuntimeError("The actor died unexpectedly")
    peer = WorkerError("peer", 0, "rank 0 (a): lost the other ranks", "rank 0 (a): lost the other ranks")
    program = WorkerError("program", 1, "ValueError: bad 3", "Traceback ...\nValueError: bad 3")
    found = describe({0: peer, 1: program}, NODES, 7, {})
    assert (found.step, found.kind, found.cause) == (7, "program", "rank 1 (host, node b): ValueError: bad 3")
    assert found.text == "rank 1 (host, node b):\nTraceback ...\nValueError: bad 3"
    user = WorkerError("user", 0, "no such shard", "no such shard")
    assert describe({0: user, 1: program}, NODES, 7, {}).text == "error: no such shard"
    assert describe({0: peer, 1: gone}, NODES, 7, {}).cause == "rank 0 (a): lost the other ranks (last step 7)"
    lost = describe({1: gone}, NODES, 7, {})
    assert (lost.kind, lost.cause) == ("lost", "lost rank 1 (host, node b) (last step 7)")
    words = {0: "rank 0 (host, node a): no progress. Rank 1 (host, node b) stopped responding in step 8."}
    assert describe({0: gone}, NODES, 7, words).cause == f"{words[0]} (last step 7)"
    assert "unknown node" in describe({5: gone}, NODES, 7, {}).cause


def test_an_error_is_the_same_on_another_rank_and_node() -> None:
    policy = RestartPolicy(9)
    for rank, node, pause in ((0, "host, node a", 1), (1, "other, node c", None)):
        error = WorkerError("program", rank, f"ValueError: bad in rank {rank}", "Traceback ...")
        assert policy.decide(describe({rank: error}, {rank: node}, 7, {}), 5).pause == pause


def test_kinds_of_errors() -> None:
    assert [kind_of(error) for error in (PeerError("x"), ConfigError("x"), DataError("x"), CheckpointError("x"))] == [
        "peer",
        "user",
        "user",
        "program",
    ]
    assert kind_of(OSError("x")) == "program" == kind_of(KeyError("x")) == kind_of(FetchError("x"))
    error = WorkerError("program", 1, "cause", "text")
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error) and str(error) == "text"


def test_restarts_without_progress_are_bounded_and_ever_slower() -> None:
    policy = RestartPolicy(8)
    pauses = [policy.decide(failure(), 5).pause for _ in range(9)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, None]
    assert RestartPolicy(0).decide(failure(), 5).pause is None


def test_a_newer_checkpoint_gives_new_restarts() -> None:
    policy = RestartPolicy(2)
    decisions = [policy.decide(failure(), committed) for committed in (0, 0, 5, 5, 10, 10, 10)]
    assert [decision.pause for decision in decisions] == [1, 2, 1, 2, 1, 2, None]
    assert "2 restarts without a new checkpoint" in decisions[-1].reason


def test_the_same_error_at_the_same_step_is_not_tried_again() -> None:
    policy = RestartPolicy(9)
    assert policy.decide(failure("program", 7, "ValueError: a"), 5).pause == 1
    assert policy.decide(failure("program", 7, "ValueError: b"), 5).pause == 2
    assert policy.decide(failure("program", 8, "ValueError: b"), 5).pause == 4
    decision = policy.decide(failure("program", 8, "ValueError: b"), 5)
    assert decision.pause is None and "the same error twice after step 8" in decision.reason

    for kind in ("lost", "peer"):  # two machines may fail at the same step
        policy = RestartPolicy(9)
        assert all(policy.decide(failure(kind), 5).pause for _ in range(2))
    assert RestartPolicy(9).decide(failure("user"), 5).pause is None
