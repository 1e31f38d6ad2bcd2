"""The sweep: its model of time and memory, the search with a simulated GPU, its files; one real step on the CPU."""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from stdit_fast import STDiT2Config
from stdit_fast.benchmarks import sweep as sweeping
from stdit_fast.benchmarks import sweep_check, sweep_step
from stdit_fast.benchmarks.readme import sweep_check_table
from stdit_fast.benchmarks.records import append
from stdit_fast.benchmarks.sweep import Conditions, Stage, Sweep, as_record, read_probes, worst_shapes
from stdit_fast.benchmarks.sweep_encoders import EncodingCost, measure_encoding
from stdit_fast.benchmarks.sweep_model import (
    GIB,
    Probe,
    Shape,
    StepModel,
    best_spread,
    closest,
    non_negative_fit,
    spread,
)
from stdit_fast.benchmarks.sweep_report import write_report
from stdit_fast.benchmarks.sweep_step import StateShard, StepMeasurer
from stdit_fast.errors import ConfigError
from stdit_fast.model.graphs import MAX_TOKENS
from stdit_fast.train import bucket_tables

CONFIGS = Path(__file__).parents[1] / "train" / "configs"
MODEL = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "mlp_ratio": 4.0}
CONDITIONS = Conditions("Fake GPU 80GB", 79.2, 74 * GIB, 15 * GIB, 1, MODEL, 200)


class FakeGPU:
    """A GPU whose steps take what a formula says, other than the model's: kernels' speed varies with the shape."""

    def __init__(self, memory: float = 76 * GIB):
        self.memory, self.calls = memory, []

    def __call__(self, shape: Shape, batch: int, checkpointed: int, pieces: int = 1) -> Probe:
        self.calls.append((shape, batch, checkpointed, pieces))
        tokens, at_once = shape.tokens(batch), -(-batch // pieces)
        twist = 1 + 0.12 * math.sin(zlib.crc32(shape.name.encode()) % 1000)
        again = 1 + 0.3 * checkpointed / 28
        seconds = 0.03 + 0.01 * pieces + twist * again * tokens * (6e-6 + 7e-10 * shape.positions + 2e-9 * shape.frames)
        kept = max(28 - checkpointed, 1)
        peak = 17 * GIB + shape.tokens(at_once) * (2304 * 60 + 2304 * 20 * kept) + at_once * 55e6
        if peak * (1 + 0.01 * math.cos(tokens)) > self.memory:
            return Probe(shape, batch, checkpointed, pieces=pieces)
        times = (seconds * 1.001, seconds, seconds * 0.999)
        return Probe(shape, batch, checkpointed, times, int(peak), pieces=pieces)


def stages(*names: str) -> list[Stage]:
    found = []
    for name in names:
        original = worst_shapes(sweeping.read_config(CONFIGS / f"{name}.yaml"))
        found.append(Stage(name, list(original), original))
    return found


def test_the_worst_aspect_ratio_of_each_bucket_counts():
    (stage,) = stages("stage1")
    sizes = {(s.resolution, s.frames): s for s in stage.shapes}
    assert len(sizes) == 11 and ("256", 64) not in sizes, "an entry that keeps nothing is no bucket"
    from stdit_fast.benchmarks.step import positions_of
    from stdit_fast.resolutions import load_resolutions

    for (resolution, _), shape in sizes.items():
        every = [positions_of(h, w) for h, w in load_resolutions()[resolution]["sizes"].values()]
        assert shape.positions == max(every)
    assert stage.original[sizes["144p", 16]] == 6


def test_a_fit_of_non_negative_coefficients():
    terms = [[1.0, x, x * x] for x in range(1, 9)]
    assert non_negative_fit(terms, [2 + 3 * t[1] for t in terms]) == pytest.approx([2, 3, 0], abs=2e-2)
    assert (non_negative_fit(terms, [5 - 0.3 * t[1] for t in terms]) >= 0).all()


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_a_sweep_evens_out_the_steps_with_few_probes(name):
    gpu = FakeGPU()
    (stage,) = stages(name)
    sweep = Sweep([stage], CONDITIONS, gpu)
    sweep.run()
    assert len(gpu.calls) == len(set(gpu.calls)) <= 10 + 3 * len(stage.shapes)
    assert set(stage.choices) == set(stage.shapes)
    for choice in stage.choices.values():
        truth = gpu(choice.shape, choice.batch, choice.checkpointed, choice.pieces)
        assert truth.ran and truth.peak <= CONDITIONS.budget and truth.median == pytest.approx(choice.seconds)
    options = {s: sweep.model.options(s, CONDITIONS.budget, 1.5 * stage.seconds) for s in stage.shapes}
    reached = spread(c.seconds for c in stage.choices.values())
    assert reached <= best_spread(options, stage.seconds) + 0.15
    # What does not fit at once runs in pieces rather than with blocks recomputed, but single samples.
    assert all(c.checkpointed < 10 or c.at_once <= 2 for c in stage.choices.values())
    assert name == "stage1" or sum(c.pieces > 1 for c in stage.choices.values()) > 15
    before = [gpu(s, b, 28).median for s, b in stage.original.items()]
    assert reached < spread(before)


def test_stages_share_their_probes_and_a_given_step_time_is_kept():
    gpu = FakeGPU()
    first, second = stages("stage2", "stage3")
    sweep = Sweep([first, second], CONDITIONS, gpu, step_seconds=2.0)
    sweep.run()
    assert first.seconds == second.seconds == 2.0
    shared = set(first.shapes) & set(second.shapes)
    assert shared and all(
        first.choices[s].seconds == pytest.approx(second.choices[s].seconds, rel=0.02) for s in shared
    )
    count = len(gpu.calls)
    Sweep(stages("stage2"), CONDITIONS, gpu, step_seconds=2.0, known=sweep.model.probes).run()
    assert len(gpu.calls) <= count + 2, "what is known is hardly measured again"
    for choice in first.choices.values():
        assert choice.seconds == pytest.approx(2.0, rel=0.5), choice


def test_a_gpu_that_is_smaller_than_it_seems_costs_probes_and_no_wrong_choice():
    gpu = FakeGPU(memory=62 * GIB)
    (stage,) = stages("stage1")
    Sweep([stage], CONDITIONS, gpu).run()
    for choice in stage.choices.values():
        assert gpu(choice.shape, choice.batch, choice.checkpointed, choice.pieces).ran
    hopeless = Sweep(stages("stage1"), CONDITIONS, FakeGPU(memory=10 * GIB))
    with pytest.raises(ConfigError, match="no step ran"):
        hopeless.run()


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    file, config = tmp_path / "sweep.jsonl", STDiT2Config()

    class Interrupted(Exception):
        pass

    def record(probe: Probe) -> None:
        append(file, [as_record(probe, CONDITIONS, config)])
        if len(file.read_text().splitlines()) == 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        Sweep(stages("stage2"), CONDITIONS, FakeGPU(), record=record).run()
    with open(file, "a") as half:
        half.write('{"suite": "sweep", "ca')
    known, hints = read_probes(file, CONDITIONS)
    assert len(known) == 20 and not hints
    other = replace(CONDITIONS, world_size=8)
    assert read_probes(file, other) == ([], []), "probes under other conditions say nothing"
    gpu = FakeGPU()
    sweep = Sweep(
        stages("stage2"), CONDITIONS, gpu, lambda p: append(file, [as_record(p, CONDITIONS, config)]), known=known
    )
    sweep.run()
    again = {(p.shape, p.batch, p.checkpointed, p.pieces) for p in known} & set(gpu.calls)
    assert not again
    first = replace(known[0], seconds=(9.0, 9.0))
    (tmp_path / "again.jsonl").write_bytes(file.read_bytes())
    append(tmp_path / "again.jsonl", [as_record(first, CONDITIONS, config)])
    again, _ = read_probes(tmp_path / "again.jsonl", CONDITIONS)
    assert len(again) == len(sweep.model.probes) and again[0].median == 9, "the last measurement of a step counts"
    assert len(read_probes(file, CONDITIONS)[0]) == len(sweep.model.probes), (
        "none is lost to the line that was half written"
    )
    table = sweep.table(sweep.stages[0])
    bucket_tables.write(tmp_path / "t.yaml", table)
    read = bucket_tables.read(tmp_path / "t.yaml")
    assert read.buckets == table.buckets and read.step_seconds == table.step_seconds


def test_after_a_change_of_kernels_the_older_probes_tell_where_to_begin(tmp_path):
    """One probe of most buckets then does, and none of the older ones counts as measured."""
    file, config = tmp_path / "sweep.jsonl", STDiT2Config()
    before = Sweep(stages("stage2"), CONDITIONS, FakeGPU(), lambda p: append(file, [as_record(p, CONDITIONS, config)]))
    before.run()
    changed = replace(CONDITIONS, code="other kernels")
    known, hints = read_probes(file, changed)
    assert not known and 25 < len(hints) <= len(before.model.probes)

    class Faster(FakeGPU):
        def __call__(self, shape, batch, checkpointed, pieces=1):
            probe = super().__call__(shape, batch, checkpointed, pieces)
            return replace(probe, seconds=tuple(0.93 * s for s in probe.seconds))

    gpu = Faster()
    sweep = Sweep(stages("stage2"), changed, gpu, step_seconds=before.stages[0].seconds, hints=hints)
    sweep.run()
    assert len(gpu.calls) <= 32 < 50 < len(before.model.probes)
    assert sweep.model.probes == [Faster()(*call) for call in gpu.calls]
    for choice in sweep.stages[0].choices.values():
        assert choice.measured and choice.seconds == pytest.approx(
            Faster()(choice.shape, choice.batch, choice.checkpointed, choice.pieces).median
        )


def test_a_sweep_that_is_out_of_time_goes_by_what_it_knows():
    """What was measured near the step time serves; the rest follows from other kernels' probes, and is marked."""
    before = FakeGPU()
    Sweep(stages("stage3"), CONDITIONS, before).run()
    hints = [before(*call) for call in list(before.calls)]
    gpu, (stage,) = FakeGPU(), stages("stage3")
    sweep = Sweep([stage], CONDITIONS, gpu, hints=hints, out_of_time=lambda: len(gpu.calls) >= 20, step_seconds=2.0)
    sweep.run()
    assert len(gpu.calls) == 20
    measured = [c for c in stage.choices.values() if c.measured]
    assert 10 < len(measured) < len(stage.choices) == len(stage.shapes)
    table = sweep.table(stage)
    assert sum(entry.measured for entry in table.buckets.values()) == len(measured)
    for choice in stage.choices.values():
        truth = gpu(choice.shape, choice.batch, choice.checkpointed, choice.pieces)
        assert truth.median == pytest.approx(choice.seconds, rel=1e-6 if choice.measured else 0.15)
        assert truth.ran and truth.peak <= (1 if choice.measured else 1.1) * CONDITIONS.budget
    with pytest.raises(ConfigError, match="no step ran"):
        Sweep(stages("stage3"), CONDITIONS, gpu, out_of_time=lambda: True).run()


def test_no_piece_is_so_small_that_it_runs_as_a_cuda_graph():
    model = StepModel(28, 15 * GIB, [FakeGPU()(Shape("256", 48, 128, 512, 256), b, c) for b, c in ((2, 0), (6, 14))])
    (shape,) = {p.shape for p in model.probes}
    options = model.options(shape, CONDITIONS.budget, 3.0)
    assert any(o.pieces > 1 for o in options)
    assert all(shape.tokens(o.batch // o.pieces) > MAX_TOKENS for o in options if o.pieces > 1)


def test_what_encoding_costs_is_kept_for_the_same_conditions(tmp_path):
    path, (stage,) = tmp_path / "encoders.json", stages("stage1")
    cost = EncodingCost((0.01, 6e-3), {(s.height, s.width): 2e-3 for s in stage.shapes}, 10 * GIB, 12 * GIB)
    sweeping.keep_encoding(path, {"code": "a"}, cost)
    assert sweeping.known_encoding(path, {"code": "a"}, stage.shapes) == cost
    assert sweeping.known_encoding(path, {"code": "b"}, stage.shapes) is None
    assert sweeping.known_encoding(path, {"code": "a"}, [Shape("x", 1, 8, 8, 1)]) is None
    assert sweeping.known_encoding(tmp_path / "none.json", {"code": "a"}, []) is None


def test_steps_are_timed_until_they_agree():
    settled, steady = sweep_step._settled, sweep_step._steady
    assert not settled([]) and not settled([0.5]) and settled([0.5, 0.51]) and not settled([0.5, 0.6])
    assert steady([0.7, 0.5, 0.51, 0.505]) == [0.5, 0.51, 0.505] and steady([0.5, 0.6]) == []
    assert not settled([0.1] * 4) and settled([0.1, 0.2] * 3), "small steps are many, but not without end"
    assert settled([1.2])


def test_encoders_make_room_and_time_for_themselves():
    gpu, cost = FakeGPU(), None
    (plain,) = stages("stage1")
    first = Sweep([plain], CONDITIONS, gpu)
    first.run()
    frame = {(s.height, s.width): 2e-3 for s in plain.shapes}
    cost = EncodingCost((0.01, 6e-3), frame, held=10 * GIB, peak=12 * GIB)
    (stage,) = stages("stage1")
    count = len(gpu.calls)
    sweep = Sweep([stage], CONDITIONS, gpu, known=first.model.probes, encoding=cost, verify=False)
    sweep.run()
    assert len(gpu.calls) == count, "its choices follow from what is known"
    for shape, choice in stage.choices.items():
        truth = gpu(shape, choice.batch, choice.checkpointed, choice.pieces)
        assert truth.peak <= CONDITIONS.budget - 10 * GIB
        expected = truth.median + 0.01 + choice.batch * (6e-3 + 2e-3 * shape.frames)
        assert choice.seconds == pytest.approx(expected, rel=0.05)
    table = sweep.table(stage)
    assert table.encoders and all(entry.peak_gib > 10 for entry in table.buckets.values())
    assert not all(entry.measured for entry in table.buckets.values())
    with pytest.raises(ConfigError, match="micro_batch_size"):
        Sweep([stage], CONDITIONS, gpu, encoding=EncodingCost((0, 0), frame, held=10 * GIB, peak=60 * GIB))


def test_encoding_is_measured_by_part():
    class Encoder:
        def __init__(self):
            self.seen = []

        def encode(self, content, noise=None):
            self.seen.append(len(content) if noise is None else tuple(content.shape))

    vae, text = Encoder(), Encoder()
    shapes = [Shape("64p", 4, 64, 64, 16), Shape("64p", 8, 64, 64, 16), Shape("32p", 1, 32, 48, 6)]
    cost = measure_encoding(shapes, torch.device("cpu"), text_tokens=8, vae_frames=16, encoders=(vae, text))
    assert set(cost.frame_seconds) == {(64, 64), (32, 48)} and set(text.seen) == {2, 32}
    assert {shape[3:] for shape in vae.seen} == {(64, 64), (32, 48)}
    seconds = EncodingCost((0.5, 0.25), {(64, 64): 0.125}, 0, 0).seconds(shapes[0], 3)
    assert seconds == 0.5 + 3 * (0.25 + 4 * 0.125)


def test_the_report_is_one_page_without_links(tmp_path):
    sweep = Sweep(stages("stage1"), CONDITIONS, FakeGPU())
    sweep.run()
    path = tmp_path / "report.html"
    write_report(path, sweep, STDiT2Config())
    page = path.read_text()
    assert page.count("data:image/png;base64,") == 5 and "http" not in page and 'src="data' in page
    for choice in sweep.stages[0].choices.values():
        assert f"<td>{choice.shape.name}<td>" in page
    assert not list(tmp_path.glob(".*")), "no draft stays"


def test_bad_arguments_are_named(tmp_path, monkeypatch):
    config = str(CONFIGS / "stage1.yaml")
    for arguments, message in (
        (["--config", config, "--margin", "0.9"], "--margin = 0.9"),
        (["--config", config, "--world-size", "0"], "--world-size = 0"),
        (["--config", config, "--longest-step", "0"], "--longest-step = 0"),
        (["--config", config, "--seconds", "-1"], "--seconds = -1"),
        (["--config", "no.yaml"], "there is no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweeping.main(arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="there is no GPU"):
        sweeping.main(["--config", config])
    table = ["--config", config, "--table", str(bucket_tables.SHIPPED / "h100-80gb" / "stage1.yaml")]
    for arguments, message in (
        ([*table, "--rounds", "1", "2"], "--rounds = .*one number, or 1, one for each table"),
        ([*table, "--rounds", "0"], "--rounds = "),
        ([*table, "--warm-up", "-1"], "--warm-up = -1"),
        ([*table[:3], "no.yaml"], "--table = 'no.yaml': it cannot be read"),
        (["--config", str(CONFIGS / "stage3.yaml"), *table[2:]], "it does not know 720p-1"),
        (table, "its steps are of NVIDIA H100 80GB HBM3, and there is no GPU here"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep_check.main(arguments)


def test_a_choice_with_the_nearest_time_is_taken():
    model = StepModel(
        28, 15 * GIB, [FakeGPU()(Shape("144p", 16, 144, 256, 144), b, c) for b, c in ((4, 0), (12, 0), (20, 28))]
    )
    options = model.options(model.probes[0].shape, 74 * GIB, 0.6)
    assert [o.batch for o in options] == list(range(1, len(options) + 1))
    chosen = closest(options, 0.3)
    assert all(abs(math.log(o.seconds / 0.3)) >= abs(math.log(chosen.seconds / 0.3)) for o in options)


# ------------------------------------------------------------------ a real step, on the CPU


def tiny(**changes) -> STDiT2Config:
    return STDiT2Config(hidden_size=24, depth=2, num_heads=2, caption_channels=16, model_max_length=8, **changes)


def test_a_step_is_measured_and_a_failure_recovered_from(monkeypatch):
    measurer = StepMeasurer(tiny(), "cpu", text_tokens=8)
    before = [p.detach().clone() for p in measurer.model.parameters()]
    shape = Shape("64p", 4, 64, 64, 16)
    probe = measurer(shape, 2, 1)
    assert probe.ran and all(s > 0 for s in probe.seconds)
    assert measurer.model.last_checkpointed == 1
    moved = [not torch.equal(a, b) for a, b in zip(before, measurer.model.parameters(), strict=True)]
    assert any(moved), "the optimizer's step is part of it"
    assert all(p.grad is None for p in measurer.model.parameters())

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("provoked")

    with monkeypatch.context() as patch:
        patch.setattr(measurer.diffusion, "training_losses", fail)
        assert not measurer(shape, 2, 1).ran
    assert measurer(shape, 2, 0).ran
    in_pieces = measurer(shape, 3, 0, 2)
    assert in_pieces.ran and in_pieces.pieces == 2 and in_pieces.at_once == 2
    inputs = measurer._inputs(shape, 3)
    gradients = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        torch.manual_seed(3)  # what the variational bound draws is not there: it is of the batch
        for part in parts:
            measurer._forward_backward(inputs, part).backward()
        gradients.append(measurer.model.blocks[0].mlp.fc1.weight.grad.clone())
        measurer.model.zero_grad(set_to_none=True)
    assert torch.allclose(*gradients, atol=1e-6, rtol=1e-3), "pieces' gradients add up to the batch's"


def test_the_states_step_is_adamw_on_a_ranks_part():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
    of_others = weights[0].detach().flatten()[8:].clone()
    copies = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    whole, part = StateShard(weights, 1, 0.9), StateShard(copies, 2, 0.9)
    plain = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    reference = torch.optim.AdamW(plain, lr=1e-6, weight_decay=0.0)
    for _ in range(3):
        grads = [torch.randn_like(w) for w in weights]
        for group in (weights, copies, plain):
            for p, g in zip(group, grads, strict=True):
                p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        reference.step()
        whole.step()
        part.step()
    for mine, other in zip(weights, plain, strict=True):
        assert torch.allclose(mine, other, atol=1e-7)
    assert [m.numel() for m in part.masters] == [8, 4]
    assert torch.equal(copies[0].flatten()[8:], of_others)


def test_records_hold_what_a_later_sweep_needs():
    probe = Probe(Shape("144p", 16, 144, 256, 144), 6, 3, (0.5, 0.6), 10 * GIB)
    record = as_record(probe, CONDITIONS, STDiT2Config())
    line = json.loads(json.dumps(vars(record)))
    assert line["case"] == "144p-16-6-recomputed-3" and line["impl"] == "step" and line["peak_gib"] == 10
    failed = as_record(Probe(probe.shape, 60, 0), CONDITIONS, STDiT2Config())
    assert failed.ms is None and failed.notes["out_of_memory"]


def test_tables_are_checked_by_the_trainer_itself(tmp_path, monkeypatch):
    """Every bucket of a small table, with stored text and latents; a bucket that runs out of memory is counted."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the run sets goes again
        monkeypatch.delenv(name)
    config = sweeping.read_config(CONFIGS / "tiny.yaml")
    config.model.hidden_size, config.model.depth, config.grad_checkpoint = 24, 2, "auto"
    config.text_encoder.model_max_length = 8
    shapes = list(worst_shapes(config))
    entries = {
        (s.resolution, s.frames): bucket_tables.Entry(2, 1, 0.1, 0.1, 0.1, 1.0, s.tokens(2), s.height, s.width)
        for s in shapes
    }
    buckets = sweep_check.Buckets(config.buckets, sweep_check.resolutions_file(config.resolutions), entries)
    trainer = sweep_check.build_trainer(config, tmp_path, encoders=False)
    found = sweep_check.check(trainer, shapes, buckets, rounds=2, warmup=1, metrics=tmp_path / "m.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * len(shapes) and len({line["bucket"] for line in lines}) == len(shapes)
    assert all(line["step_seconds"] > 0 and line["out_of_memory"] == 0 for line in lines)
    assert set(found) == set(shapes) and all(len(s) == 2 and min(s) > 0 for s, _ in found.values())
    assert trainer.step == 3 * len(shapes) and trainer.pieces.count == 0 and trainer.skipped == 0
    assert trainer.state.model.last_checkpointed == 1, "the table's blocks are recomputed"
    args = SimpleNamespace(warm_up=0, metrics=None, seconds=math.inf, memory_gib=None, out=tmp_path / "check.jsonl")
    table = bucket_tables.BucketTable("cpu", 1.0, 1, False, 0.1, {}, 8, entries)
    sweep_check.run_table(trainer, "tiny", config, table, args, 1)
    sweep_check.run_table(trainer, "tiny original sizes", config, None, args)
    assert trainer.state.model.last_checkpointed == 0, "a table's blocks are not those of the sizes after it"
    rows = sweep_check_table(tmp_path / "check.jsonl").splitlines()
    assert rows[2].startswith(f"| tiny | {len(shapes)}, {len(shapes)} | ") and rows[2].endswith("| 0 times |")
    assert rows[3].startswith("| tiny original sizes | ") and "| - |" in rows[3]
    few = sweep_check.check(trainer, shapes, buckets, rounds=5, warmup=1, limit=1e-9)
    assert not few, "no time, no steps"
    real = sweep_check.CheckTrainer.losses

    def limited(self, model, batch):
        if len(batch["samples"]) > 1 and batch["noise"].shape[2] == 1:
            raise torch.OutOfMemoryError("provoked")
        return real(self, model, batch)

    monkeypatch.setattr(sweep_check.CheckTrainer, "losses", limited)
    sweep_check.check(trainer, shapes, buckets, rounds=1, warmup=0)
    images = [s.name for s in shapes if s.frames == 1]
    assert trainer.pieces.count == len(images)
    line = sweep_check.describe("t", found, 3, trainer.pieces, 0)
    assert f"out of memory {len(images)} times; samples at once since: " in line
    assert all(f"{name} 1" in line for name in images)


def test_memory_for_activations_is_told_apart():
    """A GPU that keeps activations where there is room: the fit tells both kinds of steps apart."""
    limit = CONDITIONS.budget / 0.94

    def keeps(held: float, shape: Shape, batch: int, checkpointed: int) -> bool:
        return sweeping.keeps_activations(STDiT2Config(), limit, CONDITIONS.base, held, shape, batch, checkpointed)

    class Keeping(FakeGPU):
        def __call__(self, shape, batch, checkpointed, pieces=1):
            self.memory, memory = 1e15, self.memory
            probe = super().__call__(shape, batch, checkpointed, pieces)
            self.memory, kept = memory, keeps(0.0, shape, probe.at_once, checkpointed)
            more = shape.tokens(probe.at_once) * max(28 - checkpointed, 1) * 2304 * 4 * kept
            seconds = tuple(s * (0.97 if kept else 1) for s in probe.seconds)
            peak = probe.peak + more
            ran = {"seconds": seconds, "peak": int(peak), "keeps": kept} if peak <= memory else {}
            return Probe(shape, batch, checkpointed, **ran, pieces=pieces)

    gpu = Keeping()
    (stage,) = stages("stage1")
    sweep = Sweep([stage], CONDITIONS, gpu, keeps=keeps)
    sweep.run()
    kinds = {p.keeps for p in sweep.model.probes if p.ran}
    assert kinds == {True, False}
    assert max(map(abs, sweep.model.memory_errors)) < 0.12
    for choice in stage.choices.values():
        assert gpu(choice.shape, choice.batch, choice.checkpointed, choice.pieces).peak <= CONDITIONS.budget


def test_the_command_writes_each_stage_as_it_goes_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    """With a simulated GPU: tables with features and with encoders, both reports; nothing is measured twice."""
    gpus = []

    class Measurer(FakeGPU):
        base, limit = 12 * GIB, None

        def __init__(self, config, device, *, text_tokens, **options):
            super().__init__()
            self.text_tokens = text_tokens
            gpus.append(self)

        def __call__(self, shape, batch, checkpointed, pieces=1):
            if self.limit is not None and len(self.calls) == self.limit:
                raise KeyboardInterrupt
            return super().__call__(shape, batch, checkpointed, pieces)

    encoded = []

    def measure_encoding(shapes, device, **options):
        encoded.append(device)
        return EncodingCost((0.01, 3e-3), {(s.height, s.width): 1e-3 for s in shapes}, 9 * GIB, 10 * GIB)

    total = 79 * GIB
    monkeypatch.setattr(sweeping, "StepMeasurer", Measurer)
    monkeypatch.setattr(sweeping, "measure_encoding", measure_encoding)
    monkeypatch.setattr(sweeping.memory, "memory_limit", lambda device: total)
    for name, value in {
        "is_available": True, "current_device": 0, "get_device_name": "NVIDIA H100 80GB HBM3",
        "get_device_properties": SimpleNamespace(total_memory=total),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    out, config = tmp_path / "out", yaml.safe_load((CONFIGS / "stage1.yaml").read_text())
    for name, buckets in (
        ("first", {"144p": {1: [1.0, 48], 16: [1.0, 6]}, "1024": {1: [1.0, 3]}}),
        ("second", {"240p": {16: [1.0, 2], 32: [1.0, 1]}, "256": {1: [1.0, 24], 48: [1.0, 1]}}),
    ):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config | {"buckets": buckets}))
    command = ["--config", str(tmp_path / "first.yaml"), str(tmp_path / "second.yaml"), "--encoders", "both"]
    command += ["--out", str(out)]
    Measurer.limit = 18
    with pytest.raises(KeyboardInterrupt):
        sweeping.main(command)
    tables = {path.stem: bucket_tables.read(path) for path in out.glob("*.yaml")}
    assert set(tables) == {"first", "first-encoders"}, "the first stage is whole"
    Measurer.limit = None
    assert sweeping.main(command) == 0
    assert not set(gpus[0].calls) & set(gpus[1].calls) and len(encoded) == 1
    tables |= {path.stem: bucket_tables.read(path) for path in out.glob("*.yaml")}
    assert set(tables) == {f"{stage}{end}" for stage in ("first", "second") for end in ("", "-encoders")}
    for name, table in tables.items():
        assert table.encoders == name.endswith("-encoders")
        assert all(entry.measured for entry in table.buckets.values()) or table.encoders
    for end in ("", "-encoders"):
        page = (out / f"report{end}.html").read_text()
        assert f"first{end}:" in page and f"second{end}:" in page
    assert sweeping.main(command) == 0 and len(gpus[2].calls) < 5, "nearly all is known"
    assert sweeping.main([*command[:-4], "--encoders", "on", "--out", str(out)]) == 0
    table = bucket_tables.read(out / "first-encoders.yaml")
    assert gpus[3].calls and all(entry.measured for entry in table.buckets.values()), "by itself it measures its sizes"
