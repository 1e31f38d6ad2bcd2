"""Steps that run out of memory: run again in pieces, the same to rounding; agreed on by all, kept by a resume."""

import csv
import gc
import json
import math
import os
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import as_it_was
from safetensors.torch import load_file
from test_training import EXACT, arguments, command, losses, table, trainer  # noqa: F401 (fixtures)

from stdit_fast.train.buckets import Buckets
from stdit_fast.train.config import parse
from stdit_fast.train.out_of_memory import Pieces, take

BUCKETS = Buckets({"240p": {16: (1.0, 7)}, "144p": {1: (1.0, 4)}})
VIDEO = next(b for b in BUCKETS if b.num_frames == 16)
IMAGE = next(b for b in BUCKETS if b.num_frames == 1)


def test_pieces_are_halved_down_to_single_samples():
    pieces = Pieces()
    assert pieces.of(VIDEO, 7) == [slice(0, 7)]
    sizes = []
    while pieces.halve(VIDEO, 7):
        parts = pieces.of(VIDEO, 7)
        assert [i for part in parts for i in range(7)[part]] == list(range(7))
        sizes.append(max(part.stop - part.start for part in parts))
    assert sizes == [4, 2, 1]
    assert pieces.of(IMAGE, 4) == [slice(0, 4)], "other buckets run as they are"
    assert len({b.aspect for b in BUCKETS if pieces.of(b, 7) != [slice(0, 7)]}) > 3, "all aspect ratios of a bucket"


def test_a_tables_pieces_are_kept_and_lowered_from_there():
    pieces, bucket = Pieces(), replace(VIDEO, pieces=3)
    assert bucket.at_once == 3 and pieces.of(bucket, 7) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert pieces.of(bucket, 3) == [slice(0, 3)], "fewer samples, as an epoch's last batch has, in fewer pieces"
    assert pieces.of(bucket, 7, planned=False) == [slice(0, 7)] and not pieces.lowered(bucket)
    assert pieces.halve(bucket, 7) and pieces.lowered(bucket)
    assert max(part.stop - part.start for part in pieces.of(bucket, 7)) == 2


def test_the_lowest_limit_of_all_processes_counts_and_is_kept():
    one, other = Pieces(), Pieces()
    one.halve(VIDEO, 8)
    other.halve(VIDEO, 4)
    other.halve(IMAGE, 4)
    limits = [one.limits, other.limits]
    assert one.agree(limits) == other.agree(limits) == {"240p-16": 2, "144p-1": 2}
    third = Pieces()
    third.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert third.limits == one.limits and third.of(VIDEO, 4) == [slice(0, 2), slice(2, 4)]


def test_a_part_of_a_batch_has_all_that_belongs_to_its_samples():
    batch = {
        "samples": torch.arange(4), "text": list("abcd"), "noise": torch.randn(4, 3, 2), "posterior_noise": None,
        "tokens": torch.tensor([2, 0, 3, 1]), "text_states": torch.arange(6)[:, None], "bucket": 4, "request": object(),
    }  # fmt: skip
    part = take(batch, slice(1, 3))
    assert part["samples"].tolist() == [1, 2] and part["text"] == ["b", "c"] and part["tokens"].tolist() == [0, 3]
    assert part["text_states"].flatten().tolist() == [2, 3, 4] and torch.equal(part["noise"], batch["noise"][1:3])
    assert part["bucket"] == 4 and part["request"] is batch["request"] and part["posterior_noise"] is None
    assert take(batch, slice(0, 4)) is batch
    joined = torch.cat([take(batch, slice(0, 1))["text_states"], take(batch, slice(1, 4))["text_states"]])
    assert torch.equal(joined, batch["text_states"])


# ------------------------------------------------------------------ whole runs

BIG = {"buckets": "{64p: {1: [1.0, 3], 4: [0.5, 4], 8: [1.0, 3]}}"}
CHANGES = BIG | {"steps": 3, "grad_accumulation": 2, "ckpt_every": 50}


def fail_above(monkeypatch, most: int) -> list[int]:
    """Provokes an error wherever more than so many videos run at once, in the backward pass; the steps where it did."""
    from stdit_fast.train.trainer import Trainer

    failures, real = [], Trainer.losses

    def limited(self, model, batch):
        out = real(self, model, batch)
        if batch["noise"].shape[2] > 1 and len(batch["samples"]) > most and self.model.training:
            failures.append(self.step + 1)
            out["loss"] = _FailsWhenHalfWay.apply(out["loss"], self.state.model.blocks[1].mlp.fc1.weight)
        return out

    monkeypatch.setattr(Trainer, "losses", limited)
    return failures


class _FailsWhenHalfWay(torch.autograd.Function):
    """Fails in the backward pass, after a gradient has been left that must not count."""

    @staticmethod
    def forward(ctx, loss, weight):
        ctx.weight = weight
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        weight = ctx.weight
        weight.grad = torch.ones_like(weight) if weight.grad is None else weight.grad + 1
        raise torch.OutOfMemoryError("CUDA out of memory. (provoked)")


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):  # noqa: F811
    """A run whose batches fit: its losses and weights."""
    from stdit_fast.train.trainer import Trainer

    outputs = tmp_path_factory.mktemp("whole")
    with as_it_was():
        path = Trainer(parse(arguments(table, outputs, **CHANGES))).train()
    return losses(outputs), load_file(path / "model" / "model.safetensors")


def test_a_run_that_runs_out_of_memory_is_the_same_to_rounding(trainer, tmp_path, monkeypatch, whole):  # noqa: F811
    failures = fail_above(monkeypatch, most=1)
    split = trainer("split", **CHANGES)
    split.train()
    assert failures and split.pieces.count == len(failures)
    assert set(split.pieces.limits.values()) == {1} and all(name.startswith("64p-") for name in split.pieces.limits)
    for mine, other in zip(losses(tmp_path / "split"), whole[0], strict=True):
        assert mine == pytest.approx(other, rel=2e-4), (mine, other)
    for name, mine in zip(split.state.names, split.optimizer.masters, strict=True):
        assert (mine.cpu() - whole[1][name]).abs().max() <= 1e-4
    lines = [json.loads(line) for line in (tmp_path / "split" / "metrics.jsonl").read_text().splitlines()]
    assert [line["out_of_memory"] for line in lines][-1] == len(failures)
    # It goes on with what it learned.
    count = len(failures)
    again = trainer("split", **CHANGES | {"steps": 4})
    assert again.pieces.limits == split.pieces.limits and again.pieces.count == count
    again.train()
    assert again.pieces.limits and all(step > 3 for step in failures[count:])
    assert {name for name in again.pieces.limits} >= {name for name in split.pieces.limits}


def test_a_run_in_a_tables_pieces_is_the_same_to_rounding(trainer, tmp_path, monkeypatch, whole):  # noqa: F811
    from stdit_fast.train.trainer import Trainer

    at_once, real = [], Trainer.losses

    def counted(self, model, batch):
        at_once.append((len(batch["samples"]), self.state.model.checkpointed_blocks))
        return real(self, model, batch)

    monkeypatch.setattr(Trainer, "losses", counted)
    split = trainer("planned", **CHANGES | {"grad_checkpoint": "auto"})
    split.data.buckets._buckets = [replace(b, pieces=b.batch_size, checkpointed=1) for b in split.data.buckets]
    split.train()
    assert set(at_once) == {(1, 1)} and len(at_once) > 6, "each sample by itself, with the table's blocks recomputed"
    assert split.pieces.count == 0 and not split.pieces.limits
    for mine, other in zip(losses(tmp_path / "planned"), whole[0], strict=True):
        assert mine == pytest.approx(other, rel=2e-4), (mine, other)
    for name, mine in zip(split.state.names, split.optimizer.masters, strict=True):
        assert (mine.cpu() - whole[1][name]).abs().max() <= 1e-4


def test_passes_that_are_chosen_are_the_same_to_rounding(trainer, tmp_path, monkeypatch, whole):  # noqa: F811
    """Nothing ran out of memory; a batch that does runs in halves of what it ran at once."""
    from stdit_fast.model.stdit2 import STDiT2

    asked, most = [], 2
    monkeypatch.setattr(STDiT2, "samples_at_once", lambda self, shape, held: asked.append(shape) or most)
    chosen = trainer("chosen", **CHANGES | {"split_batches": "true"})
    chosen.train()
    assert asked and len(asked) == len(set(asked)) and chosen.last_parts == 2
    assert chosen.pieces.count == 0 and chosen.pieces.limits == {}
    for mine, other in zip(losses(tmp_path / "chosen"), whole[0], strict=True):
        assert mine == pytest.approx(other, rel=2e-4), (mine, other)
    for name, mine in zip(chosen.state.names, chosen.optimizer.masters, strict=True):
        assert (mine.cpu() - whole[1][name]).abs().max() <= 1e-4
    fixed = trainer("fixed", **CHANGES | {"split_batches": "true", "grad_checkpoint": 1, "steps": 1})
    plain = trainer("plain", **CHANGES | {"steps": 1})
    count = len(asked)
    fixed.train(), plain.train()
    assert len(asked) == count, "a number of blocks was asked for, or encoders are in memory"


def test_where_passes_are_chosen_by_themselves(trainer, monkeypatch):  # noqa: F811
    """On one GPU and on features, where that was measured."""
    from stdit_fast.model.stdit2 import STDiT2

    monkeypatch.setattr(STDiT2, "samples_at_once", lambda self, shape, held: 2)
    one = trainer("one", **CHANGES)
    batch = {"bucket": 0, "noise": torch.empty(4, 4, 2, 6, 6), "request": SimpleNamespace(parts=1)}
    assert one._at_once(batch) == 4, "encoders are in memory"
    one.config.features.path = "features"
    assert one._at_once(batch) == 2
    one.config.split_batches = False
    assert one._at_once(batch) == 4
    one.processes = replace(one.processes, world_size=2)
    one.config.split_batches = "auto"
    assert one._at_once(batch) == 4, "on several GPUs"
    one.config.split_batches, one.config.features.path = True, None
    assert one._at_once(batch) == 2, "both, as it is asked for"


def test_half_of_what_ran_at_once_is_less_than_was_chosen():
    pieces = Pieces()
    assert [part.stop - part.start for part in pieces.of(VIDEO, 7, at_once=3)] == [2, 2, 3]
    assert pieces.halve(VIDEO, 7, 3) and pieces.limits == {"240p-16": 2}
    assert len(pieces.of(VIDEO, 7, at_once=3)) == 4
    assert pieces.halve(VIDEO, 7, 1) is False


def test_gradients_may_leave_in_the_last_pass_of_a_step_alone(trainer, monkeypatch):  # noqa: F811
    """Whether it is of a batch or of the last of its pieces, and again where the passes of a step begin anew."""
    fail_above(monkeypatch, most=1)
    one = trainer("passes", **CHANGES | {"overlap_communication": "true"})
    passes, inside, real = [], [], one.booster.backward  # (step, whether gradients may leave, whether it failed)

    @contextmanager
    def reducing():
        inside.append(True)
        try:
            yield
        finally:
            inside.clear()

    def backward(*args):
        passes.append((one.step, bool(inside), True))
        real(*args)
        passes[-1] = (one.step, bool(inside), False)

    monkeypatch.setattr(one.optimizer, "reducing", reducing)
    monkeypatch.setattr(one.booster, "backward", backward)
    one.train()
    for step in range(3):
        *before, last = [leaving for number, leaving, failed in passes if number == step and not failed]
        assert last and not any(before) and before
    assert any(failed for *_, failed in passes)


def test_a_single_sample_that_does_not_fit_ends_the_run(trainer, monkeypatch):  # noqa: F811
    fail_above(monkeypatch, most=0)
    one = trainer("none", **BIG | {"steps": 20})
    with pytest.raises(torch.OutOfMemoryError, match="provoked"):
        one.train()


WORKER = """
import sys

import torch
from stdit_fast.train.config import parse
from stdit_fast.train.trainer import Trainer

real = Trainer.losses
def limited(self, model, batch):
    if self.processes.rank == 1 and batch["noise"].shape[2] == 8 and len(batch["samples"]) > 1:
        raise torch.OutOfMemoryError("provoked")
    return real(self, model, batch)
Trainer.losses = limited
torch.set_num_threads(1)
trainer = Trainer(parse(sys.argv[1:]))
trainer.train()
sys.stdout.write(f"limits {trainer.processes.rank} {trainer.pieces.limits} {trainer.pieces.count}\\n")
sys.stdout.flush()

from stdit_fast.parallel.overlap import GradientReduction

# What ZeRO-2 does with gradients at the end of its passes, over gloo: each process gets its part of their mean.
processes = trainer.processes
weights = [torch.nn.Parameter(torch.zeros(3, 5)), torch.nn.Parameter(torch.zeros(4))]
weights[0].grad = torch.full((3, 5), processes.rank + 1.0)
weights[1].grad = torch.ones(4) if processes.rank else None
first, second = (processes.all_gather(part) for part in GradientReduction(weights, [], processes).finish())
assert first.tolist() == [1.5] * 15 + [0.0] and second.tolist() == [0.5] * 4, (first, second)
assert all(weight.grad is None for weight in weights)
processes.close()
"""


def test_two_processes_agree_where_one_runs_out_of_memory(table, tmp_path, whole):  # noqa: F811
    script, outputs = tmp_path / "worker.py", tmp_path / "run"
    script.write_text(WORKER)
    args = arguments(table, outputs, **CHANGES | {"grad_accumulation": 1})
    launcher = command(2, [])[:-2]  # without the module
    done = subprocess.run([*launcher, str(script), *args], env=os.environ | EXACT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("limits"))
    assert len(said) == 2 and said[0].split(" ", 2)[2] == said[1].split(" ", 2)[2], "both know the same"
    assert "{'64p-8': 1}" in said[0], said
    message = "64p-8 ran out of memory; its batches run in pieces of at most"
    assert 1 <= (done.stdout + done.stderr).count(message) <= 2, "once each time that the size was lowered"
    for mine, other in zip(losses(outputs), whole[0], strict=True):
        assert mine == pytest.approx(other, rel=2e-4), (mine, other)
    line = json.loads((outputs / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["imbalance_seen"] >= 0 and line["imbalance_expected"] == 0 and math.isfinite(line["imbalance_seen"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's memory to run out of")
def test_a_gpu_runs_out_of_memory_and_the_run_goes_on(trainer, table, tmp_path):  # noqa: F811
    """The real thing: the process is allowed less memory than its largest batches need."""
    # Activations are what fills it: 24 videos of 16 frames, some 2 GB, beside 0.2 GB of weights and moments.
    data = tmp_path / "many.csv"
    with open(table, newline="") as file:
        head, *rows = csv.reader(file)
    video = next(row for row in rows if "bikes" in row[0] and row[2] == "60")
    images = [[str(table.parent / row[0]), *row[1:]] for row in rows if row[2] == "1"]
    with open(data, "w", newline="") as file:
        csv.writer(file).writerows([head, *[video] * 24, *images])
    sizes = {
        "model.hidden_size": 288, "model.depth": 6, "model.num_heads": 4, "grad_checkpoint": "false",
        "buckets": "{96p: {1: [1.0, 4], 16: [1.0, 24]}}", "dataset.drop_last": "false",
        "steps": 6, "ckpt_every": 50, "cuda_graphs": "false",
    }  # fmt: skip
    whole = trainer("whole", data, **sizes)
    torch.cuda.reset_peak_memory_stats()
    whole.train()
    assert not whole.pieces.count
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    del whole
    gc.collect()
    torch.cuda.empty_cache()
    one = trainer("split", data, **sizes)
    held = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((held + 0.7 * (peak - held)) / total)
    try:
        one.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert one.pieces.count >= 1 and one.pieces.limits
    for mine, other in zip(losses(tmp_path / "split"), losses(tmp_path / "whole"), strict=True):
        assert mine == pytest.approx(other, rel=2e-2), (mine, other)
