"""Sequence parallelism over gloo: what a group computes is what one process computes, and what travels is counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sequence_worker import DEPTH

from stdit_fast.errors import ConfigError
from stdit_fast.parallel.groups import check_split
from stdit_fast.parallel.sequence import bounds

WORKER = Path(__file__).with_name("sequence_worker.py")


PROCESSES = 4  # with groups of 2 and of 4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(WORKER), str(folder), str(PROCESSES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def test_loss_and_every_gradient_are_those_of_one_process(results):
    for rank, result in enumerate(results):
        for name, case in result["cases"].items():
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
        assert "4 frames of 1 tokens cannot be split" in said["too few positions"]


def test_parts_differ_by_one_at_most():
    for total in range(40):
        for parts in (1, 2, 3, 4, 8):
            edges = bounds(total, parts)
            sizes = [b - a for a, b in zip(edges, edges[1:], strict=False)]
            assert edges[0] == 0 and edges[-1] == total and len(sizes) == parts
            assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_a_split_without_work_for_some_rank():
    with pytest.raises(ConfigError, match="sequence_parallel = 8: 6 frames of 100 tokens cannot be split over 8 ranks"):
        check_split(8, 6, 100)
    check_split(4, 4, 4)
