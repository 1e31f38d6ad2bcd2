"""The plan's arithmetic, its bounds, and a run held against its projection."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from stdit_fast.benchmarks import plan, plan_check, plan_model, plan_times
from stdit_fast.benchmarks.plan_model import Encoders, Network, Sizes
from stdit_fast.benchmarks.plan_times import Fit, Interval, Times, work
from stdit_fast.benchmarks.records import Record, append
from stdit_fast.train import bucket_tables
from stdit_fast.train.buckets import Buckets

RECIPE = Path(__file__).parents[1] / "train" / "configs" / "recipe_v1_1.yaml"
SECONDS = np.array([0.01, 2e-15, 5e-15])  # of a made-up GPU: a step, an operation of the GEMMs, one of attention


def made_up_entry(frames, height, width, batch, measured=True, spread=0.0):
    seconds = float(SECONDS @ work(frames, height, width, batch))
    spread = seconds * spread
    return bucket_tables.Entry(batch, 0, seconds, seconds - spread, seconds + spread, 40.0, 0, height, width, measured)


def made_up_table(folder, stage="stage1", **more):
    """A table of some of stage 1's buckets, measured on the made-up GPU."""
    buckets = {
        ("144p", 1): made_up_entry(1, 144, 256, 48),
        ("144p", 16): made_up_entry(16, 144, 256, 12, **more),
        ("144p", 32): made_up_entry(32, 144, 256, 6),
        ("256", 16): made_up_entry(16, 256, 256, 6),
        ("1024", 1): made_up_entry(1, 1024, 1024, 6),
    }
    table = bucket_tables.BucketTable("made-up GPU", 80.0, 1, False, 0.3, {}, 200, buckets)
    path = folder / f"{stage}.yaml"
    bucket_tables.write(path, table)
    return path


def test_the_mix_is_what_assignment_draws():
    """Against the mean of what training's own assignment does."""
    table = {
        "144p": {1: (0.5, 8), 16: (1.0, 4)},
        "240p": {16: (0.3, 2), 32: (0.6, 1)},
        "480p": {1: (0.4, 2), 16: (0.2, 1)},
    }
    buckets = Buckets(table)
    rows = [
        [30_000, 60, 480, 854],
        [20_000, 120, 480, 854],
        [10_000, 1, 480, 854],
        [5_000, 1, 144, 256],
        [7, 30, 99, 99],
    ]
    sizes = Sizes.of_rows(rows)
    mix = plan_model.samples_of_an_epoch(sizes, buckets, 3)
    repeated = [np.repeat(getattr(sizes, n), sizes.count.astype(int)) for n in ("num_frames", "height", "width")]
    assigned = buckets.assign(*repeated, 3, np.random.default_rng(0))
    drawn = np.bincount(assigned[assigned >= 0], minlength=len(buckets))
    assert np.abs(mix - drawn).max() < 400 and mix.sum() == pytest.approx(drawn.sum(), rel=0.01)
    counted = Sizes.of_samples(*repeated)
    assert plan_model.samples_of_an_epoch(counted, buckets, 3) == pytest.approx(mix)
    assert sizes.longer(2.0).num_frames.tolist() == [120, 240, 1, 1, 60]


def test_fit():
    sizes = [(1, 144, 256, 48), (16, 144, 256, 6), (16, 240, 426, 4), (1, 1024, 1024, 3), (32, 480, 854, 1)]
    works = [work(*size) for size in sizes]
    fit = Fit.to(works, [float(SECONDS @ w) for w in works])
    assert fit.coefficients == pytest.approx(SECONDS, rel=1e-6) and fit.error < 1e-9
    mid = fit.seconds(16, 256, 256, 8)
    assert mid.mid == pytest.approx(SECONDS @ work(16, 256, 256, 8)) and mid.high / mid.mid == pytest.approx(1.03)
    noisy = Fit.to(works, [float(SECONDS @ w) * f for w, f in zip(works, (1.1, 0.9, 1.1, 0.9, 1.0), strict=True)])
    assert 0.05 < noisy.error < 0.2 and (noisy.coefficients >= 0).all()
    bounds = noisy.seconds(16, 256, 256, 8)
    assert (bounds.high - bounds.mid) / bounds.mid == pytest.approx(2 * noisy.error + 0.03)
    with pytest.raises(ValueError, match="3 measured steps, of 4"):
        Fit.to(works[:3], [1.0, 2.0, 3.0])


def test_probes_of_a_sweep(tmp_path):
    """The sweep's own records, of which one ran out of memory."""
    path = tmp_path / "sweep.jsonl"
    records = []
    for frames, height, width, batch, recomputed in (
        (1, 144, 256, 48, 0), (16, 144, 256, 6, 0), (16, 240, 426, 4, 4), (1, 1024, 1024, 3, 28), (32, 480, 854, 1, 0),
    ):  # fmt: skip
        notes = {"shape": ["x", frames, height, width, 0], "batch": batch, "checkpointed": recomputed}
        ms = 1e3 * float(SECONDS @ work(frames, height, width, batch, recomputed))
        records.append(Record("sweep", str(len(records)), "step", ms, ms, ms, device="G", versions={}, notes=notes))
    records.append(Record("sweep", "big", "step", None, None, None, device="G", versions={}, notes=notes))
    append(path, records)
    times = Times.of_probes(path)
    assert times.fit.coefficients == pytest.approx(SECONDS, rel=1e-6) and times.fit.points == 5
    assert plan_times.fit_of_probes(path, "another GPU") is None
    table = bucket_tables.read(made_up_table(tmp_path))
    probes = plan_times.fit_of_probes(path, "G")
    assert Times.of_table(dataclasses.replace(table, device="G"), path).fit.coefficients == pytest.approx(
        probes.coefficients
    )
    # What "auto" recomputed of 28 blocks in the step suite.
    assert [plan_times.recomputed_blocks(n) for n in (13_824, 47_040, 110_160)] == [0, 3, 19]


def test_communication():
    network = Network(inside=300e9, across=50e9, per_node=8, overlapped=True)
    assert network.pass_seconds(1) == (0, 0, 0)
    assert network.pass_seconds(2).mid == pytest.approx(767e6 * 2 / 2 / 300e9)
    far = network.pass_seconds(64)
    assert far.low == pytest.approx(767e6 * 2 * 63 / 64 / 50e9) and far.high == pytest.approx(2 * far.low)
    step = Interval.of(0.3)
    outside = 2 * 0.128  # of gradients and weights; all else is hidden
    expected = outside * far.low, outside * far.mid, 2 * far.high
    assert network.exposed_seconds(64, step) == pytest.approx(expected)
    alone = Network(inside=300e9, across=50e9, per_node=8)
    assert alone.exposed_seconds(64, step).mid == pytest.approx(2 * far.mid)
    assert network.exposed_seconds(64, Interval.of(0.03)).mid == pytest.approx(2 * far.mid - 0.03)


def test_the_slowest_of_many():
    seconds, share = np.array([2.0, 1.0]), np.array([0.25, 0.75])
    assert plan_model.expected_slowest(seconds, share, 1) == pytest.approx(1.25)
    assert plan_model.expected_slowest(seconds, share, 2) == pytest.approx(2 - 0.75**2)
    assert plan_model.expected_slowest(seconds, share, 64) == pytest.approx(2.0, abs=1e-6)
    # Put together by their times, one step in a thousand holds both kinds.
    assert plan_model.grouped_waiting(seconds, share, 64) < 0.002
    assert plan_model.grouped_waiting(seconds, share, 1) == 0


def test_a_phase_counted_by_hand(tmp_path):
    """One bucket, two GPUs: half the steps at twice the batch size, and what encoding adds."""
    times = Times.of_table(bucket_tables.read(made_up_table(tmp_path, spread=0.1)))
    buckets = Buckets({"144p": {16: (1.0, 6)}})
    sizes = Sizes.of_rows([[1000, 60, 144, 256]])
    mix = plan_model.samples_of_an_epoch(sizes, buckets, 3)
    common = dict(gpus=2, network=Network(inside=1e30), steps=100, original_gpus=4)
    found = plan_model.estimate(mix, buckets, times, **common, keep="samples")
    seconds = times.table.buckets["144p", 16].seconds
    assert found.samples == pytest.approx(100 * 4 * 6) and found.steps == pytest.approx(100 * 4 * 6 / (2 * 12))
    assert found.days.mid == pytest.approx(100 * seconds / 86400) and found.measured == 1
    assert found.days.low == pytest.approx(found.days.mid * 0.9 * 0.97)
    assert found.days.high == pytest.approx(found.days.mid * 1.1 * 1.03)
    assert found.gpu_hours.mid == pytest.approx(2 * 100 * seconds / 3600)
    encoders = Encoders(pixels_per_second=1e6, captions_per_second=10.0)
    online = plan_model.estimate(mix, buckets, times, **common, keep="steps", encoders=encoders)
    assert online.steps == pytest.approx(100)
    assert online.step_seconds.mid == pytest.approx(seconds + 12 * 16 * 144 * 256 / 1e6 + 1.2)
    hours = plan_model.encoding_hours(sizes, [buckets, buckets], 3, encoders)
    assert hours == pytest.approx(1000 * (16 * 144 * 256 / 1e6 + 0.1) / 3600)


def test_what_a_table_lacks_is_extrapolated(tmp_path):
    times = Times.of_table(bucket_tables.read(made_up_table(tmp_path)))
    (missing, *_) = Buckets({"240p": {16: (1.0, 2)}})
    step = times.of(missing)
    assert not step.measured and step.batch_size > 2
    assert times.fit.coefficients[0] == 0 and 0 < times.fit.error < 0.1  # 10 ms of each step that no work explains
    assert step.seconds.mid == pytest.approx(
        SECONDS @ work(16, missing.height, missing.width, step.batch_size), rel=0.05
    )
    assert step.seconds.mid == pytest.approx(0.3, rel=0.3)
    (known, *_) = Buckets({"144p": {16: (1.0, 2)}})
    assert times.of(known).measured and times.of(known).batch_size == 12


def test_the_table_for_the_readme(tmp_path, monkeypatch):
    made_up_table(tmp_path)
    monkeypatch.setattr(plan, "DEFAULT_GPU", str(tmp_path))  # an absolute path stands for itself
    lines = plan.markdown(64).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:9]] == [
        f"| {name}" for name in ("images", "stage 1a", "stage 1b", "stage 1c", "stage 2", "stage 3", "in all")
    ]
    assert all(line.count("|") == 7 for line in lines[:9])
    assert "made-up GPU" in lines[10]


def test_the_recipe(tmp_path, capsys):
    """Everything that the plan says of the shipped recipe, on the made-up GPU for stage 1 and the fit elsewhere."""
    made_up_table(tmp_path)
    out = tmp_path / "plan.json"
    assert plan.main(["--gpus", "64", "--tables", str(tmp_path), "--json", str(out)]) == 0
    text = capsys.readouterr().out
    for part in (
        "the report: 9 days on 64 H800, 13,824 GPU-hours",
        "with online encoders",
        "stage1.yaml (5 of 5 measured)",
        "no bucket itself, a fit to",
        "the recipe's sizes, which are assumed",
        "clips 2 times as long",
        "all-reduce 4.6 ms",
        "said 7",
    ):
        assert part in text, part
    content = json.loads(out.read_text())
    low, mid, high = content["days"]["features"]
    assert 0 < low < mid < high < content["days"]["online"][2]
    assert [p["phase"] for p in content["phases"]] == ["images", *(f"stage {n}" for n in ("1a", "1b", "1c", "2", "3"))]
    stage_1b = content["phases"][2]["features"]
    assert 0 < stage_1b["measured"] < 1  # 240p and 512 are not in the table
    assert stage_1b["days"][1] == pytest.approx(stage_1b["steps"] * stage_1b["step_seconds"][1] / 86400)
    # Twice the GPUs take half the time, but for what they wait for each other.
    assert plan.main(["--gpus", "128", "--tables", str(tmp_path), "--json", str(out)]) == 0
    assert mid / 2 < json.loads(out.read_text())["days"]["features"][1] < 0.6 * mid


def test_a_plan_names_a_fit_once_and_where_one_serves(tmp_path, capsys):
    """The shipped tables have every bucket, to rounding; where some are missing a fit is named."""
    assert plan.main(["--gpus", "64", "--tables", "h100-80gb"]) == 0
    assert "extrapolated: a fit" not in capsys.readouterr().out
    made_up_table(tmp_path)
    assert plan.main(["--gpus", "64", "--tables", str(tmp_path)]) == 0
    fits = [line for line in capsys.readouterr().out.splitlines() if "extrapolated: a fit" in line]
    assert fits and len(fits) == len(set(fits))


def test_speeds_of_the_encoders(tmp_path, monkeypatch):
    recipe = plan.Recipe.read(RECIPE)
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    assert plan.our_encoders(recipe, plan.arguments_of([])) == recipe.encoders
    machine = {"device": "G", "versions": {}}
    records = [
        Record("encoders", case, "fused", *[ms] * 3, **machine)
        for case, ms in (("vae-272x240x424", 400.0), ("t5-17-full", 50.0))
    ]
    append(tmp_path / "h100" / "encoders.jsonl", records)
    found = plan.our_encoders(recipe, plan.arguments_of([]))
    assert found.pixels_per_second == pytest.approx(272 * 240 * 424 / 0.4)
    assert found.captions_per_second == pytest.approx(17 / 0.05)
    assert plan.our_encoders(recipe, plan.arguments_of(["--pixels-per-second", "7"])).pixels_per_second == 7


def test_the_original_by_the_same_arithmetic():
    """Its projected steps against its configurations' own comments: 1, 7 and 13 s."""
    recipe = plan.Recipe.read(RECIPE)
    rows = {r.phase.name: r for r in plan.plan(recipe, plan.arguments_of([]))}
    for name, said in (("stage 1b", 1.0), ("stage 1a", 7.0), ("stage 3", 13.0)):
        assert rows[name].original.step_seconds.mid == pytest.approx(said, rel=0.3), name


def write_metrics(path, buckets, factor=1.0, skip=()):
    lines = []
    for i in range(6):
        for name, batch in buckets:
            b = plan_check.bucket_of(name, batch)
            tokens = batch * b.num_frames * -(-b.height // 16) * -(-b.width // 16)
            seconds = float(SECONDS @ work(b.num_frames, b.height, b.width, batch)) * factor * (5 if i < 2 else 1)
            lines.append({"step": len(lines), "bucket": name, "step_seconds": seconds / 0.9, "wait_share": 0.1,
                          "tokens_per_second": tokens / seconds * 0.9})  # fmt: skip
    lines.append({"step": 9, "val_loss": 1.0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_run_is_held_against_its_projection(tmp_path, capsys):
    table = str(made_up_table(tmp_path))
    run = write_metrics(tmp_path / "a.jsonl", [("144p-16-0.56", 12), ("1024-1-1.0", 6)])
    assert plan.main(["--check", run, "--table", table]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("144p-16-0.56") and " 4 " in lines[3] and lines[3].endswith("0.0%")
    assert "inside the bounds; 0 of 2 buckets extrapolated" in lines[-1]
    slow = write_metrics(tmp_path / "b.jsonl", [("144p-16-0.56", 12)], factor=1.2)
    assert plan.main(["--check", slow, "--table", table]) == 1
    assert "+20.0%, OUTSIDE the bounds" in capsys.readouterr().out
    other = write_metrics(tmp_path / "c.jsonl", [("144p-16-0.56", 6)])  # half the table's batch size
    assert plan.main(["--check", other, "--table", table]) == 0
    assert "extrapolated" in capsys.readouterr().out


def test_recorded_steps_are_held_against_their_projection(tmp_path, capsys):
    """Of another batch size than the table's, by a fit that knows what a step takes whatever its batch."""
    times = Times.of_table(bucket_tables.read(made_up_table(tmp_path)))
    works = [
        work(f, h, w, b) for f, h, w, b in ((1, 144, 256, 9), (16, 144, 256, 6), (1, 512, 512, 9), (96, 144, 256, 1))
    ]
    times.fit = Fit.to(works, [float(SECONDS @ w) for w in works])
    path = tmp_path / "train_step.jsonl"
    for case, scale in (("144p-16-6-features", 1.0), ("144p-16-12-online", 9.0), ("144p-1-48-features", 1.02)):
        frames, batch = map(int, case.split("-")[1:3])
        ms = 1e3 * scale * float(SECONDS @ work(frames, 144, 256, batch)) / 0.8
        notes = {"wait_share": 0.2, "steps": 5}
        append(path, [Record("train_step", case, "stdit_fast", ms, ms, ms, device="G", versions={}, notes=notes)])
    lines, inside = plan_check.check_run(path, times)
    assert inside and len(lines) == 5
    assert lines[2].startswith("144p-16-0.56") and "+0.0%  extrapolated" in lines[2]
    assert lines[3].startswith("144p-1-0.56") and lines[3].endswith("+2.0%")


def test_what_cannot_be_planned_is_refused(tmp_path, capsys):
    def refused(*arguments):
        assert plan.main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "it must be above 0" in refused("--gpus", "0")
    assert "there is no such file" in refused("--recipe", str(tmp_path / "none.yaml"))
    assert "it is for --check METRICS" in refused("--table", "stage2.yaml")
    assert "did you mean 'h100-80gb'" in refused("--tables", "h100") or "no sweep of it" in refused("--tables", "h100")
    text = RECIPE.read_text()
    bad = tmp_path / "bad.yaml"
    for old, new, message in (
        ("gpus: 64", "gpuss: 64", "unknown key; did you mean 'gpus'"),
        ("steps: 6000", "steps: many", "optimizer steps of the phase"),
        ("data: finetuning", "data: finetune", "did you mean 'finetuning'"),
        ("[0.15, 60", "[0.25, 60", "shares summing to 1"),
        ("table: stage3", "table: stage4", "there is no"),
        ("pixels_per_second: 4.33e7", "pixels: 3", "pixels_per_second, captions_per_second, source"),
    ):
        assert old in text
        bad.write_text(text.replace(old, new))
        assert message in refused("--recipe", str(bad)), message
    for content, message in ((None, "no such file"), ("{", "line 1 is no line of metrics"), ("", "no bucket has more")):
        metrics = tmp_path / "m.jsonl"
        if content is not None:
            metrics.write_text(content)
        assert message in refused("--check", str(metrics), "--table", str(made_up_table(tmp_path)))
    assert plan_times.BETWEEN_MACHINES > 0
