"""What a driver's loop beside the training does when what it looks at fails."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RaySystemError

from ebwm_dist.cluster import capacity, worker
from ebwm_dist.cluster import group as groups
from ebwm_dist.cluster.capacity import wait_for_nodes
from ebwm_dist.cluster.group import Group
from ebwm_dist.config.schema import Config


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    """Return a group whose workers train until they are asked to leave, or at most for ten seconds."""
    monkeypatch.setattr(groups, "_POLL", 0.01)
    stopped = threading.Event()

    def fit() -> Any:
        return SimpleNamespace(return_value=3 if stopped.wait(10) else 10)

    group = object.__new__(Group)
    group._trainer = lambda: SimpleNamespace(fit=fit)  # type: ignore[assignment,return-value,method-assign]
    group._control = SimpleNamespace(stop=SimpleNamespace(remote=lambda reason: stopped.set()))
    return group


def test_an_error_while_watching_neither_ends_nor_deafens_the_training(
    group: Group, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stop after two failed looks at the cluster is heard at once, and success is no failure."""
    looks: list[int] = []

    def watch() -> str | None:
        looks.append(len(looks))
        if len(looks) < 3:
            raise TimeoutError("the cluster does not answer")
        return "SIGTERM"

    assert group.run(watch) == 3
    warnings = capsys.readouterr().out
    assert warnings.count("WARNING") == 1 and "the cluster does not answer" in warnings


def test_a_worker_hears_of_a_stop_after_answers_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "STOP_POLL", 0.0)
    answers = iter([RaySystemError("no answer"), OSError("no answer"), None, "SIGTERM"])

    def get(reference: None, timeout: float) -> str | None:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("ray.get", get)
    stop = SimpleNamespace(reason=None)
    worker.forward_stop(stop, SimpleNamespace(stop_reason=SimpleNamespace(remote=lambda: None)))
    assert stop.reason == "SIGTERM"


def test_nodes_are_waited_for_while_the_cluster_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "_POLL", 0.0)
    said: list[str] = []
    answers = iter([ConnectionError("gone"), ConnectionError("gone"), 1])

    def free() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert wait_for_nodes(Config(), free, lambda: False, said.append) == 1
    assert len(said) == 1 and "ConnectionError: gone" in said[0]
