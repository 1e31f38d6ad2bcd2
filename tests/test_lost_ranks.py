"""A rank that dies or hangs in a run of several processes: the others end with its name, and the run can go on."""

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import test_training
from test_training import arguments, losses, wait_for_step

from stdit_fast.parallel.watchdog import BESIDE, COMPUTING, EXIT_STATUS, Place, _lost

table = test_training.table  # a fixture


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


LAUNCH = Path(__file__).parents[1] / "train" / "launch"


def test_launchers_start_nothing_where_something_is_missing(tmp_path):
    """A setting that there is not is told once; so is a machine that does not say how many GPUs it has."""

    def launched(script: str, **environment) -> tuple[int, str]:
        environment = os.environ | {"PYTHON": sys.executable, "HEAD": "localhost", "NODES": "1"} | environment
        done = subprocess.run([LAUNCH / script, "--lrr", "1"], env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    for script in ("one_node.sh", "several_nodes.sh"):
        status, said = launched(script, GPUS="1")
        assert status == 2 and said.count("error:") == 1 and "did you mean 'lr'?" in said, said
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        assert launched(script, PATH=path, GPUS="") == (2, "error: nvidia-smi finds no GPUs: set GPUS\n")


def test_a_rank_killed_in_mid_step_is_named_and_the_run_goes_on(table, tmp_path):
    """The launcher begins the run anew, from its last checkpoint."""
    import psutil

    args = arguments(table, tmp_path, steps=40, ckpt_every=2, dead_after=3, sequence_parallel=2)
    script = LAUNCH / "one_node.sh"
    environment = os.environ | test_training.EXACT | {"GPUS": "2", "RESTARTS": "1", "PYTHON": sys.executable}
    launcher = subprocess.Popen(
        [script, *args], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(tmp_path, 3, launcher)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(launcher.pid).children()}
    ranks["1"].kill()
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output
    said = (
        rf"error: rank 1 \(.*, process {ranks['1'].pid}\) at step \d+, .* is lost: its process has ended; rank 0 ends"
    )
    assert re.search(said, output), output
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 41))


def test_a_run_goes_on_with_fewer_processes(table, tmp_path):
    """Where a rank is lost for good the others end within a minute, and what is left goes on, sharing nothing."""
    import psutil

    args = arguments(table, tmp_path, steps=8, ckpt_every=2, sequence_parallel=2)
    environment = os.environ | test_training.EXACT | {"GPUS": "2", "RESTARTS": "0", "PYTHON": sys.executable}
    launcher = subprocess.Popen(
        [LAUNCH / "one_node.sh", *args], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(tmp_path, 3, launcher)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(launcher.pid).children()}
    lost = ranks["0"]  # which keeps the store
    lost.kill()
    killed = time.monotonic()
    output, _ = launcher.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert launcher.returncode != 0
    assert re.search(rf"error: rank 0 \(.*, process {lost.pid}\) at step \d+, .* is lost: ", output), output
    trained = [step for step, *_ in losses(tmp_path)]
    assert trained[-1] < 8

    environment["GPUS"] = "1"
    changes = ["--sequence_parallel", "1", "--grad_accumulation", "2"]
    done = subprocess.run(
        [LAUNCH / "one_node.sh", *args, *changes], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr or "resumed from" in done.stdout
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 9))


def test_slurm_starts_a_launcher_a_node(tmp_path):
    """With what Slurm says of the job, as several_nodes.sh takes it."""
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\n[ \"$1 $2 $3\" = 'show hostnames node[3-4]' ] && echo node3 && echo node4"
    )
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$HEAD $NODES $RUN $GPUS" "$@"')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "SLURM_GPUS_ON_NODE": "8"}
    slurm |= {"SLURM_SUBMIT_DIR": str(LAUNCH.parents[1]), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [LAUNCH / "slurm.sbatch", "--outputs", "a b"]
    done = subprocess.run(["bash", *command], env=os.environ | slurm, capture_output=True, text=True)
    script = LAUNCH / "several_nodes.sh"
    assert done.stdout == f"node3 2 77 8 --kill-on-bad-exit=1 {script} --outputs a b\n", done.stderr
    assert os.access(script, os.X_OK)


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
        r"error: no rank has got on for \d+ s; the least far is rank 1 \(.*\) at step 7, loading a batch, and the "
        r"furthest is rank 0 \(.*\) at step 7, forward and backward, bucket 64p-8-1.0; rank {}"
    )
    for rank in (0, 1):
        assert re.search(standing.format(rank), done.stderr), done.stderr


def test_silence_is_judged_by_what_a_rank_was_doing():
    places = [Place(rank, "node", f"machine {rank}", 1, step=3, phase=COMPUTING) for rank in range(2)]
    assert _lost([(places[0], 95.0), (places[1], 85.0)], "here", 100.0, 20.0) == ""
    said = _lost([(places[0], 95.0), (places[1], 75.0)], "here", 100.0, 20.0)
    assert said == "rank 1 (node, process 1) at step 3, forward and backward is lost: nothing was heard of it for 25 s"
    writing = replace(places[1], phase=BESIDE)
    assert _lost([(writing, -150.0)], "here", 100.0, 20.0) == ""
    assert _lost([(writing, -250.0)], "here", 100.0, 20.0)
    assert _lost([(replace(writing, done=True), -250.0)], "here", 100.0, 20.0) == ""
    assert "has failed: ValueError: no" in _lost(
        [(replace(writing, error="ValueError: no"), 99.0)], "here", 100.0, 20.0
    )
