"""Sequence parallelism over gloo: what a group computes is what one process computes, and what travels is counted."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import test_training
import torch
from conftest import as_it_was, relative_error
from safetensors.torch import load_file
from sequence_worker import DEPTH
from test_fused_model import inputs, masked, models, on_device, step
from test_training import arguments

from stdit_fast.errors import ConfigError
from stdit_fast.kernels import residual_norm, temporal_attention
from stdit_fast.kernels import results as kernel_results
from stdit_fast.parallel.copies import SLOTS, PeerCopies, Slots
from stdit_fast.parallel.groups import SequenceGroup, check_split
from stdit_fast.parallel.sequence import FrameSwitch, bounds, split_frames

MASKS = "{mask_no: 0.4, mask_quarter_head: 0.3, mask_quarter_random: 0.3}"
table = test_training.table  # a fixture
WORKER = Path(__file__).with_name("sequence_worker.py")


PROCESSES = 4  # with groups of 2 and of 4


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Runs in this process leave it as it was, for those in processes of their own."""
    with as_it_was():
        yield


@pytest.fixture(scope="module")
def run_arguments(table, tmp_path_factory):
    """A run of 5 steps whose batches need 1, 2 and 4 ranks, from a checkpoint of one process that shares nothing."""
    from stdit_fast.train.config import parse
    from stdit_fast.train.trainer import Trainer

    folder = tmp_path_factory.mktemp("run")
    started = Trainer(parse(arguments(table, folder / "alone", steps=1))).train()
    buckets = {"buckets": "{64p: {1: [1.0, 2], 4: [0.5, 2], 7: [1.0, 1]}}", "mask_ratios": MASKS}
    shared = {"sequence_parallel": "{64p: {4: 2, 7: 4}}", "load": started, "grad_accumulation": 2}
    return arguments(table, folder / "shared", steps=5, **buckets, **shared)


@pytest.fixture(scope="module")
def results(run_arguments, tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | test_training.EXACT
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(WORKER), str(folder), str(PROCESSES), str(port), json.dumps(run_arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def test_loss_and_every_gradient_are_those_of_one_process(results):
    for rank, result in enumerate(results):
        for name, case in (*result["cases"].items(), *result["copies"].items()):
            assert not case["missing"], (rank, name, case["missing"])
            worst = max(case["errors"], key=case["errors"].get)
            assert case["errors"][worst] <= 1e-5, (rank, name, worst, case["errors"][worst])


def test_two_units_a_block_travel_each_way_and_nothing_else(results):
    """Over a group, however unequal its parts are; recomputed blocks send their forward pass's units again."""
    for name in results[0]["cases"]:
        size = int(name.split(":")[0])
        for first in range(0, PROCESSES, size):
            group = [result["cases"][name] for result in results[first : first + size]]
            unit, recomputed = sum(case["unit"] for case in group), group[0]["recomputed"]
            for way, units in (("forward", 2 * DEPTH), ("backward", 2 * (DEPTH + recomputed))):
                calls = [call for case in group for call in case[way]]
                assert {kind for kind, _ in calls} == {"all_to_all_single"}, (name, way)
                assert sum(size for _, size in calls) == units * unit, (name, way)


def test_copies_need_no_collective(results):
    for result in results:
        assert result["copies"].keys() == result["cases"].keys()
        for name, case in result["copies"].items():
            assert case["forward"] == case["backward"] == [], name


def test_processes_without_gpus_are_given_collectives(results):
    for result in results:
        for size in (2, 4):
            assert f"videos shared by {size}: their parts travel by collectives" in result["transfers"]


def test_predictions_without_gradients(results):
    for result in results:
        for size in (2, 4):
            assert result[f"prediction {size}"] <= 1e-5
            assert result[f"largest {size}"][0] == result[f"largest {size}"][1]


def test_what_cannot_be_is_refused(results):
    for result in results:
        said = result["refusals"]
        assert said["not a size"].startswith("sequence_parallel = 3: choose one of 1, 2, 4, 8")
        assert (
            said["does not divide"] == "sequence_parallel = 8: it must divide the number of processes, 4: use 1, 2, 4"
        )
        assert said["not of GPUs"] == (
            "sequence_transfers = 'copies': 2 of 2 ranks cannot read the others' memory; use collectives"
        )
        assert "4 frames of 1 tokens cannot be split" in said["too few positions"]


def test_a_training_step_of_mixed_groups_is_that_of_one_process(results):
    """Images on ranks of their own, clips on two, videos on four, in two micro-batches."""
    for result in results:
        found = result["training"]
        assert found["gradients"] > 100 and found["worst"] <= 1e-5
        assert set(sum(found["kinds"], [])) == {1, 2, 4}


def test_sampling_shares_a_video(results):
    """Two loops through the pipeline, and one file from the command line."""
    for result in results:
        found = result["sampling"]
        assert found["difference"] <= 1e-5
        assert found["status"] == 0 and len(found["files"]) == 1 and found["files"][0].endswith("a-sea.mp4")


def test_ranks_that_see_different_data_are_told(results):
    for result in results:
        assert (
            re.match(
                r"sequence_parallel = [24]: the ranks that share a batch see different data \(checksums of rank [02]: ",
                result["different data"],
            )
            or not result["different data"]
        )
    assert sum(bool(result["different data"]) for result in results) >= 2


def test_a_shared_batch_that_does_not_fit_says_what_would(results):
    for rank, result in enumerate(results):
        said = result["out of memory"]
        assert re.match(rf"TrainingError: rank {rank} ran out of memory with \d samples of 64p-[47]-.* share", said), (
            said
        )


def test_checkpoints_move_between_groups_and_one_process(results, run_arguments, tmp_path):
    from stdit_fast.train.config import parse
    from stdit_fast.train.trainer import Trainer

    assert [result["run"]["step"] for result in results] == [5] * PROCESSES
    changes = ["--sequence_parallel", "1", "--steps", "6"]
    one = Trainer(parse([*run_arguments, *changes]))
    assert one.step == 5
    weights = load_file(Path(results[0]["run"]["path"], "model", "model.safetensors"))
    for name, master in zip(one.state.names, one.optimizer.masters, strict=True):
        assert torch.equal(master, weights[name])
    assert one.train().name == "step-00000006"


def test_parts_differ_by_one_at_most():
    for total in range(40):
        for parts in (1, 2, 3, 4, 8):
            edges = bounds(total, parts)
            sizes = [b - a for a, b in zip(edges, edges[1:], strict=False)]
            assert edges[0] == 0 and edges[-1] == total and len(sizes) == parts
            assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_kernels_behind_the_switch(monkeypatch):
    """One process that switches with itself: fused ops on what arrives, forward and backward, against plain PyTorch."""

    class Arrived:
        def wait(self):
            pass

    def to_itself(out, given, *sizes, group, async_op):
        assert sizes == ([given.numel()], [given.numel()]) and async_op
        out.copy_(given)
        return Arrived()

    monkeypatch.setattr("torch.distributed.all_to_all_single", to_itself)
    fused, plain = models(depth=1)
    given = masked(on_device(inputs(batch=2, frames=2, height=2, width=6)))
    want = step(plain, given)
    with split_frames(fused, FrameSwitch(SequenceGroup(1, 0, 0, None, None), 2, chunks=2)):
        got = step(fused, given)
    for name, value in want.items():
        assert relative_error(got[name], value) <= 1e-4, name


class OwnSlots(Slots):
    """Slots of a rank that is alone."""

    def __init__(self, size: int):
        self.size = size
        self.memory = torch.zeros(SLOTS, size, dtype=torch.uint8)

    def of(self, rank: int, slot: int) -> torch.Tensor:
        return self.memory[slot]

    def meet(self) -> None:
        pass


def test_slots_are_filled_anew_when_all_have_read_them():
    """Which the meeting of the next transfer says, or one of its own; larger ones are made where they are needed."""
    copies, meetings = PeerCopies(0, 1, torch.device("cpu"), OwnSlots), []
    arriving = torch.empty(4)

    def stage(most: int = 4):
        staged = copies.stage(most, most, torch.float32)
        copies._slots.meet = lambda: meetings.append(len(sent))
        return staged

    def send(staged):
        sent.append(staged.slot)
        copies.all_to_all(staged, arriving, [4], [0]).wait()

    sent: list[int] = []
    first = stage()
    first.values.copy_(torch.arange(4.0))
    assert len(copies._slots.of(0, 0)) >= 16
    send(first)
    assert torch.equal(arriving, torch.arange(4.0)) and meetings == [1]
    others = [stage().slot for _ in range(SLOTS - 1)]
    assert sorted([first.slot, *others]) == list(range(SLOTS)) and meetings == [1]
    assert stage().slot == first.slot and meetings == [1, 1]  # nobody has met since it was read
    send(stage())
    send(stage())
    assert meetings == [1, 1, 2, 3]
    stage(most=1000)
    assert copies._slots.size >= 4000


@pytest.mark.parametrize("batch", [1, 2])
def test_kernels_write_where_rows_are_sent_from(batch, monkeypatch):
    """Copies of one process from itself: fused ops put what they send there, and find what plain PyTorch finds."""
    places, offers = [], []
    real = kernel_results.memory_for

    def memory_for(shape, like):
        offers.extend(place.data_ptr() for place in kernel_results._offered)
        made = real(shape, like)
        places.append(made.data_ptr())
        return made

    for kernels in (residual_norm, temporal_attention):
        monkeypatch.setattr(kernels, "memory_for", memory_for)
    fused, plain = models(depth=1)
    given = masked(on_device(inputs(batch=batch, frames=3, height=2, width=6)))
    want = step(plain, given)
    group = SequenceGroup(1, 0, 0, None, None, PeerCopies(0, 1, torch.device("cpu"), OwnSlots))
    with split_frames(fused, FrameSwitch(group, 3, chunks=2)):
        got = step(fused, given)
    for name, value in want.items():  # one caption may have one token, where queries change nothing
        assert relative_error(got[name], value) <= 1e-4 or max(got[name].norm(), value.norm()) < 1e-5, name
    # The norm's rows, and those of attention in two chunks, unless samples have to be brought into order.
    assert len(offers) == (3 if batch == 1 else 1) and set(offers) <= set(places)


@pytest.mark.parametrize("frames, positions", [(9, 3641), (5, 6554), (33, 993), (8, 8)])
def test_all_ranks_cut_the_same_chunks(frames, positions):
    """Also where the number of tokens from which on there are two lies between what two ranks have."""
    chunks = []
    for rank in range(2):
        group = SequenceGroup(2, rank, 0, None, None)
        chunks.append(FrameSwitch(group, frames)._chunks(1, positions))
    assert chunks[0] == chunks[1]
    covered = sorted(i for chunk in chunks[0] for part in chunk for i in range(positions)[part])
    assert covered == list(range(positions))


def test_a_split_without_work_for_some_rank():
    with pytest.raises(ConfigError, match="sequence_parallel = 8: 6 frames of 100 tokens cannot be split over 8 ranks"):
        check_split(8, 6, 100)
    check_split(4, 4, 4)
