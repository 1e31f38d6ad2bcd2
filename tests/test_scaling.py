"""The arithmetic of the scaling benchmarks."""

import numpy as np

from stdit_fast.benchmarks.readme import scaling_table
from stdit_fast.benchmarks.records import Record, append
from stdit_fast.benchmarks.scaling import assumed_data, merged
from stdit_fast.benchmarks.scaling_curves import compare, runs_of
from stdit_fast.benchmarks.scaling_picture import alone, plot


def test_intervals():
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    communication, computation = [(0, 4), (5, 6), (8, 9)], [(1, 2), (3, 3.5), (5, 6), (8.5, 10)]
    assert alone(communication, computation) == [(0, 1), (2, 3), (3.5, 4), (8, 8.5)]
    both = sum(end - start for start, end in merged([*communication, *computation]))
    busy = sum(end - start for start, end in computation)
    assert both - busy == sum(end - start for start, end in alone(communication, computation))


def test_a_picture(tmp_path):
    plot({"communication": [(0, 1), (50, 52)], "computation": [(0.5, 40), (51, 80)]}, tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_runs_train_as_many_batches_a_step():
    runs = runs_of(4)
    assert list(runs) == ["one GPU", "each its own", "shared by 2", "shared by 4"]
    for processes, options in runs.values():
        assert processes // options.get("sequence_parallel", 1) * options["grad_accumulation"] == 4


def test_curves_are_held_to_the_noise_of_sums():
    exact = np.linspace(2.0, 1.0, 60)
    losses = {"one GPU": exact, "each its own": exact * 1.004, "shared by 2": exact * 1.006}
    assert compare(losses)["within_noise"]
    assert not compare(losses | {"shared by 2": exact * 1.02})["within_noise"]


def test_assumed_data_are_half_images():
    frames, height, width = assumed_data()
    assert len(frames) == len(height) == len(width)
    assert 0.48 < (frames == 1).mean() < 0.52 and frames.max() <= 2000


def test_the_table_holds_gpus_to_as_many_alone(tmp_path):
    records = [
        record("mix", "rank 0 of 2 alone", 50.0, tokens_per_second_and_gpu=1000),
        record("mix", "rank 1 of 2 alone", 50.0, tokens_per_second_and_gpu=3000),
        record("mix", "rank 0 of 4 alone", 50.0, tokens_per_second_and_gpu=9000),
        record("mix", "2 GPUs", 51.0, tokens_per_second_and_gpu=1900),
        record("16 frames", "1 GPU", 10.0, tokens_per_second_and_gpu=500, tokens_per_gpu=5),
        record("32 frames", "2 GPUs, in one chunk", 12.5, tokens_per_second_and_gpu=400, tokens_per_gpu=5),
        record("64 frames", "4 GPUs", 12.5, tokens_per_second_and_gpu=400, tokens_per_gpu=5),
        record("16 frames", "rank 0 of 4 alone", 12.5, tokens_per_second_and_gpu=480, tokens_per_gpu=5),
        record("16 frames", "rank 1 of 4 alone", 12.5, tokens_per_second_and_gpu=320, tokens_per_gpu=5),
        record("prediction", "1 GPU", 30.0),
        record("prediction", "2 GPUs", 20.0),
        Record.of_times("scaling", "weights shared", "2 GPUs, alone", [4.0]),
    ]
    append(tmp_path / "scaling.jsonl", records)
    rows = [line for line in scaling_table(tmp_path / "scaling.jsonl").splitlines() if "GPUs" in line][1:]
    assert [row.split(" | ")[-1] for row in rows] == ["95.0% |", "80.0% |", "100.0% |", "75.0% |", "- |"]


def record(case: str, impl: str, ms: float, **notes) -> Record:
    return Record.of_times("scaling", case, impl, [ms], notes={"depth": 28, **notes})
