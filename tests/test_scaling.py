"""The arithmetic of the scaling benchmarks."""

import numpy as np

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
