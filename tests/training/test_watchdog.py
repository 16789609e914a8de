"""Ranks that hang, are stopped or die end the run in the configured time, with a line that names step and rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ebwm_dist.distributed import World, leave
from ebwm_dist.errors import DataError
from ebwm_dist.training.watchdog import EXIT_CODE, Watchdog, diagnose, heartbeat_store, is_communication_error
from tests.distributed import free_port

STEP_TIMEOUT = 3.0
COMMUNICATION_FAILED = 3

FAULTS = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(60),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "error": lambda: (_ for _ in ()).throw(DataError("shard 7 is damaged")),
    "none": lambda: None,
}
SCENARIOS = [(fault, rank) for fault in FAULTS for rank in (0, 1)]


def train(rank: int, fault: str, faulty_rank: int, port: str) -> None:
    """Play a trainer of two ranks, one of which meets a fault in step 3."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    world = World(rank, rank, 2, torch.device("cpu"), f"host-{rank}")
    watchdog = Watchdog(world, heartbeat_store(), startup_timeout=60, step_timeout=STEP_TIMEOUT)
    try:
        for step in range(1, 6):
            watchdog.beat(step, "data")
            watchdog.beat(step, "forward/backward")
            if step == 3 and rank == faulty_rank:
                time.sleep(0.5)  # until the heartbeat has told where this rank is
                print(f"fault at {time.time()}", file=sys.stderr, flush=True)
                FAULTS[fault]()
            dist.all_reduce(torch.ones(1))
            if step == 1:
                watchdog.first_step_done()
    except DataError as error:
        watchdog.close(failure=f"DataError: {error}")
        os._exit(2)
    except RuntimeError as error:
        assert is_communication_error(error)
        print(watchdog.explain(error), file=sys.stderr)
        sys.exit(COMMUNICATION_FAILED)
    watchdog.close()
    leave()


def main(folder: Path) -> None:
    """Run all scenarios at once, forked from here so that torch is imported once."""
    ranks = {}
    for fault, faulty_rank in SCENARIOS:
        port = free_port()
        for rank in (0, 1):
            pid = os.fork()
            if pid == 0:
                name = folder / f"{fault}-{faulty_rank}-{rank}"
                stream = os.open(name, os.O_CREAT | os.O_WRONLY)
                os.dup2(stream, 2)
                torch.set_num_threads(1)
                code = 1
                try:
                    train(rank, fault, faulty_rank, port)
                    code = 0
                except SystemExit as error:
                    code = int(error.code or 0)
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            ranks[pid] = (fault, faulty_rank, rank)
    deadline = time.monotonic() + 40
    while ranks and time.monotonic() < deadline:
        for pid, (fault, faulty_rank, rank) in list(ranks.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del ranks[pid]
                result = f"{os.waitstatus_to_exitcode(status)} {time.time()}"
                (folder / f"{fault}-{faulty_rank}-{rank}.end").write_text(result)
            elif fault == "stop" and rank == faulty_rank and (fault, rank, 1 - rank) not in ranks.values():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    program = "import sys, pathlib\nfrom tests.training.test_watchdog import main\nmain(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, timeout=80)
    return folder


def outcome(folder: Path, fault: str, faulty_rank: int, rank: int) -> tuple[int, float, str]:
    name = f"{fault}-{faulty_rank}-{rank}"
    code, end = (folder / f"{name}.end").read_text().split()
    fault_time = (folder / f"{fault}-{faulty_rank}-{faulty_rank}").read_text().splitlines()[0]
    return int(code), float(end) - float(fault_time.rpartition(" ")[2]), (folder / name).read_text()


@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("fault", ["stop", "sleep", "kill", "error"])
def test_the_other_rank_ends_in_time_and_names_the_culprit(outcomes: Path, fault: str, faulty: int) -> None:
    code, seconds, text = outcome(outcomes, fault, faulty, 1 - faulty)
    assert code == (COMMUNICATION_FAILED if fault in ("kill", "error") else EXIT_CODE)
    assert seconds < (STEP_TIMEOUT if code == EXIT_CODE else 0) + 12
    assert text.count(f"rank {1 - faulty} (host-{1 - faulty}): ") == 1
    assert f"rank {1 - faulty} (host-{1 - faulty}): " in text and "in step 3 (phase forward/backward" in text
    if faulty == 0 and fault != "sleep":
        assert "Rank 0 (127.0.0.1) does not answer: its process was stopped or has ended" in text
    else:
        said = {
            "stop": r"stopped responding in step 3 \(phase forward/backward, test_watchdog.py:\d+\)",
            "sleep": r"keeps the others waiting, in step 3 \(phase forward/backward, test_watchdog.py:\d+\)",
            "kill": r"stopped responding in step 3 \(phase forward/backward",
            "error": r"ended in step 3 \(phase forward/backward, .*\): DataError: shard 7 is damaged",
        }[fault]
        assert re.search(rf"Rank {faulty} \(host-{faulty}\) {said}", text)


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_rank_that_hangs_ends_itself(outcomes: Path, faulty: int) -> None:
    code, seconds, text = outcome(outcomes, "sleep", faulty, faulty)
    assert code == EXIT_CODE
    assert STEP_TIMEOUT < seconds < STEP_TIMEOUT + 15
    assert f"Rank {faulty} (host-{faulty}) keeps the others waiting, in step 3 (phase forward/backward" in text


def test_an_undisturbed_run_says_nothing(outcomes: Path) -> None:
    for rank in (0, 1):
        code, _, text = outcome(outcomes, "none", 0, rank)
        assert (code, re.sub("fault at .*\n", "", text)) == (0, "")


def report(step: int, phase: str, beat: int = 2, **changes: object) -> dict:
    told = {"beat": beat, "time": time.time(), "host": "h", "step": step, "phase": phase, "count": 0, "place": "a.py:1"}
    return {**told, "in_collective": True, "end": None, "blames": None, **changes}


def test_verdicts() -> None:
    earlier = {rank: report(7, "data", beat=1) for rank in range(20)}
    assert diagnose({0: report(7, "data"), 1: report(7, "data")}, earlier) == ""
    assert diagnose({0: report(7, "data"), 1: report(6, "validation")}, earlier) == (
        "Rank 1 (h) is behind, in step 6 (phase validation, a.py:1)."
    )
    assert diagnose({0: report(7, "data"), 1: None}, earlier) == "Rank 1 has never reported."
    blaming = report(7, "data", end="it lost the other ranks", blames="Rank 2 did it.")
    assert diagnose({0: report(7, "data"), 1: blaming}, earlier) == "Rank 2 did it."
    many = {0: report(7, "data")} | {rank: report(6, "data") for rank in range(1, 20)}
    assert diagnose(many, earlier).endswith("And 11 more.")


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    """The newline lies ready when the process goes on, so that no time of this test's counts as its silence."""
    program = """
import sys, time, torch
from ebwm_dist.distributed import World
from ebwm_dist.training.watchdog import Watchdog
watchdog = Watchdog(World(0, 0, 1, torch.device("cpu"), "h"), None, 60, 3)
watchdog.first_step_done()
print("ready", flush=True)
sys.stdin.readline()
time.sleep(0.7)
watchdog.beat(1, "data")
print("still here", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        # The watchdog looks every 0.3 s: had it counted the stop, it would have spoken by now.
        assert process.stdout.readline() == "still here\n"
        _, text = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == EXIT_CODE
    line = program.splitlines().index("time.sleep(60)") + 1
    assert f"in step 1 (phase data, <string>:{line}). If it may take this long, raise training.step_timeout." in text


def test_a_save_that_hangs_beside_the_training_ends_the_rank_and_a_slow_one_does_not() -> None:
    program = """
import threading, time, torch
from ebwm_dist.distributed import World
from ebwm_dist.training.watchdog import Watchdog
watchdog = Watchdog(World(0, 0, 1, torch.device("cpu"), "h"), None, 60, 1)
watchdog.first_step_done()
written = 0
def write():
    global written
    for written in range(20):
        time.sleep(0.15)
    print("hangs", flush=True)
    time.sleep(60)
save = threading.Thread(target=write, daemon=True)
save.start()
watchdog.watch_save(lambda: (save.ident, written))
while True:
    watchdog.beat(3, "data")
    time.sleep(0.05)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    line = program.splitlines().index("    time.sleep(60)") + 1
    assert (done.returncode, done.stdout) == (EXIT_CODE, "hangs\n")
    assert (
        f"in step 3 (phase checkpoint, beside the training, <string>:{line}). If it may take this long" in done.stderr
    )


def test_a_rank_that_waits_for_the_network_is_ended_with_the_reason() -> None:
    program = """
import time, torch
from ebwm_dist.distributed import World
from ebwm_dist.training.watchdog import Watchdog
world = World(0, 0, 1, torch.device("cpu"), "h")
watchdog = Watchdog(world, None, 60, 0.5, outage=lambda: "cannot fetch s3://bucket/a.tar (timed out)")
watchdog.first_step_done()
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_CODE
    assert "): cannot fetch s3://bucket/a.tar (timed out). If it may take this long, raise" in done.stderr
