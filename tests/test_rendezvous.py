"""How processes meet: who is missing is said, a stop ends the wait, and what cannot work is refused in one line."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from ebwm_dist import rendezvous
from ebwm_dist.errors import UserError
from ebwm_dist.rendezvous import Place, meet
from tests.distributed import free_port

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
SCHEDULED = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_GTIDS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, *SCHEDULED):
        monkeypatch.delenv(name, raising=False)


def place(rank: int, world_size: int = 2, port: int = 0, address: str = "127.0.0.1") -> Place:
    return Place(rank, 0, world_size, address, port or int(free_port()))


def never() -> None:
    return None


def once_reported(capfd: pytest.CaptureFixture[str]) -> tuple[Callable[[], str | None], list[str]]:
    """Return a reason to stop that comes with the first report, and the reports."""
    reports: list[str] = []

    def reason() -> str | None:
        reports.extend(capfd.readouterr().err.splitlines())
        return "SIGTERM" if reports else None

    return reason, reports


def test_a_process_without_a_launcher_is_alone() -> None:
    assert Place.of_environment() == Place(0, 0, 1, "localhost", 0)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "describes part of a distributed run, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set",
        ),
        ({"RANK": "0"}, "describes part of a distributed run, LOCAL_RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = '' in the environment: must be a number at least 1"),
        ({**LAUNCHED, "RANK": ""}, "RANK = '' in the environment: must be a number from 0 to 1"),
        ({**LAUNCHED, "RANK": "2"}, "RANK = '2' in the environment: must be a number from 0 to 1"),
        ({**LAUNCHED, "LOCAL_RANK": "first"}, "LOCAL_RANK = 'first' in the environment"),
        ({**LAUNCHED, "MASTER_PORT": "http"}, "MASTER_PORT = 'http' in the environment"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "the scheduler has started 2 tasks (SLURM_NTASKS)"),
        (
            {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_GTIDS": "0,1"},
            "the scheduler has started 2 tasks (SLURM_STEP_NUM_TASKS)",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "has started 4 tasks (OMPI_COMM_WORLD_SIZE)"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "has started 4 tasks (PMI_SIZE)"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        Place.of_environment()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "2"},  # in a shell of salloc
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_GTIDS": "0"},  # in a batch script
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_GTIDS": "0"},
        {**LAUNCHED, "SLURM_NTASKS": "2", "SLURM_PROCID": "1"},  # torchrun in each task
    ],
)
def test_a_scheduler_may_start_one_task_or_a_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Place.of_environment().world_size == int(variables.get("WORLD_SIZE", 1))


def test_all_ranks_meet() -> None:
    port = int(free_port())
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda rank: meet(place(rank, 3, port), f"n{rank}", 60, never), (2, 1, 0)))
    stores[0].set("word", "there")
    assert stores[2].get("word") == b"there"


@pytest.mark.parametrize(
    ("rank", "awaited"),
    [
        (0, r"127\.0\.0\.1:\d+ waits for ranks 1, 2 of 3; present: 0 \(here\)"),
        (1, r"rank 1 waits for rank 0 at 127\.0\.0\.1:\d+ \(Connection refused\)"),
    ],
)
def test_who_is_missing_is_said_and_a_stop_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: int, awaited: str
) -> None:
    monkeypatch.setattr(rendezvous, "FIRST_REPORT", 0.2)
    reason, reports = once_reported(capfd)
    with pytest.raises(UserError, match=rf"^stopped \(SIGTERM\) while {awaited}$"):
        meet(place(rank, 3), "here", 1e6, reason)
    assert len(reports) == 1 and re.match(awaited, reports[0])


def test_an_address_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match=r"gave up after 0.1 s: rank 1 waits for rank 0 at no\.invalid:\d+ \("):
        meet(place(1, address="no.invalid"), "here", 0.1, never)


def test_a_taken_port_is_one_line() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"^port {port} of this machine is taken, .* `deepspeed --master_port PORT`"
        ):
            meet(place(0, 2, port=port), "here", 60, never)
        meet(place(0, 1, port=port), "here", 60, never)  # nobody has to find a process that is alone


def test_two_processes_of_one_rank_and_other_sizes_are_refused() -> None:
    """As when two nodes are given the same rank, or a second run has the port of a first one."""
    port = int(free_port())
    stop = [""]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, place(0, 3, port), "a", 60, lambda: stop[0])
        second = pool.submit(meet, place(1, 3, port), "b", 60, lambda: stop[0])
        while not rendezvous.dist.TCPStore("localhost", port, wait_for_workers=False).check(["ebwm/0/node 1"]):
            pass
        with pytest.raises(UserError, match=rf"there are two processes of rank 1 at 127.0.0.1:{port}"):
            meet(place(1, 3, port), "c", 60, never)
        with pytest.raises(UserError, match="WORLD_SIZE is 4 here, and 3 for others"):
            meet(place(3, 4, port), "c", 60, never)
        stop[0] = "done"
        for future in (first, second):
            with pytest.raises(UserError, match="stopped"):
                future.result()


def test_the_end_of_rank_0_ends_the_others() -> None:
    port = int(free_port())
    stop = [""]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, place(0, 3, port), "a", 60, lambda: stop[0])
        second = pool.submit(meet, place(1, 3, port), "b", 60, never)
        while not rendezvous.dist.TCPStore("localhost", port, wait_for_workers=False).check(["ebwm/0/node 1"]):
            pass
        stop[0] = "done"
        assert first.exception() is not None
        del first
        with pytest.raises(UserError, match="rank 0 has ended before all ranks were there"):
            second.result()


def test_a_server_that_never_answers_is_named_and_a_stop_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "FIRST_REPORT", 0.2)
    reason, reports = once_reported(capfd)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match=rf"stopped \(SIGTERM\) while rank 1: 127.0.0.1:{port} accepts"):
            meet(place(1, port=port), "node", 60, reason)
    assert re.match(rf"rank 1: 127.0.0.1:{port} accepts connections but is no rendezvous \(for \d+ s now\)", reports[0])
