"""A rank that dies or hangs in a run of several processes: the others end with its name, and the run can go on."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest
import test_training
from test_training import arguments, losses, wait_for_step

from stdit_fast.parallel.watchdog import EXIT_STATUS
from stdit_fast.train import checkpoint

table = test_training.table  # a fixture


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(args: list[str], processes: int) -> list[subprocess.Popen]:
    """A run without a launcher, which would end the other ranks itself."""
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | test_training.EXACT | common
    return [
        subprocess.Popen(
            [sys.executable, "-m", "stdit_fast.train", *args],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


@pytest.fixture
def run(table, tmp_path):
    """run(processes, **changes) -> processes of an endless run that has made its first checkpoint."""
    started = []

    def make(processes: int, **changes):
        args = arguments(table, tmp_path, steps=10**6, ckpt_every=2, dead_after=3, **changes)
        started.extend(start(args, processes))
        wait_for_step(tmp_path, 3, started[0])
        return started

    yield make
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_rank_killed_in_mid_step_is_named_and_the_run_goes_on_with_fewer(run, table, tmp_path):
    ranks = run(2, sequence_parallel=2)
    ranks[1].kill()
    killed = time.monotonic()
    output, _ = ranks[0].communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert ranks[0].returncode == EXIT_STATUS, output
    assert re.search(rf"error: rank 1 \(.*, process {ranks[1].pid}\) at step \d+, .* is lost", output), output
    saved = checkpoint.newest_checkpoint(tmp_path / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    test_training.run(arguments(table, tmp_path, steps=step + 1))
    assert losses(tmp_path)[-1][0] == step + 1


HANGING = """
import os, sys, time
import torch
import torch.distributed as dist
from stdit_fast.parallel import watchdog
from stdit_fast.parallel.processes import Processes

rank = int(os.fork() == 0)
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
dist.init_process_group("gloo")
with watchdog.Watchdog(Processes(rank, 2, torch.device("cpu")), dead_after=30, hang_timeout=2, every=0.2) as watch:
    watch.at(7, watchdog.LOADING)
    if rank:
        time.sleep(60)
    watch.at(7, watchdog.COMPUTING, "64p-8-1.0")
    dist.all_reduce(torch.ones(1))
"""


def test_a_rank_that_hangs_is_named_with_its_place():
    """One process waits for a batch that does not come, the other for it, in a collective."""
    command = [sys.executable, "-c", HANGING, str(free_port())]
    done = subprocess.run(command, env=os.environ | test_training.EXACT, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_STATUS, done.stderr
    standing = (
        r"error: no rank has got on for \d+ s; the least far is rank 1 \(.*\) at step 7, loading a batch; rank {}"
    )
    for rank in (0, 1):
        assert re.search(standing.format(rank), done.stderr), done.stderr
