"""How many ranks share the batches of which bucket, and how such batches fill the ranks of a step."""

from dataclasses import replace

import numpy as np
import pytest

from stdit_fast.errors import ConfigError
from stdit_fast.train.bucket_tables import Entry
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.degrees import check_setting, pack, sequence_sizes
from stdit_fast.train.sampler import BucketSampler

TABLE = {"144p": {1: (1.0, 8), 16: (1.0, 4), 64: (1.0, 1)}, "720p": {1: (1.0, 2), 16: (1.0, 1), 64: (1.0, 1)}}
BUCKETS = Buckets(TABLE)


def by_entry(sizes, buckets=BUCKETS) -> dict:
    return {(b.resolution, b.num_frames): int(size) for b, size in zip(buckets, sizes, strict=True)}


def test_one_size_leaves_short_clips_alone():
    buckets = Buckets({"144p": {1: (1.0, 1), 4: (1.0, 1), 8: (1.0, 1)}})
    sizes = by_entry(sequence_sizes(8, buckets, 1152, 8), buckets)
    assert sizes == {("144p", 1): 1, ("144p", 4): 1, ("144p", 8): 8}


def test_a_table_names_buckets():
    sizes = by_entry(sequence_sizes({"720p": {64: 4, 16: 2}}, BUCKETS, 1152, 8))
    assert sizes == dict.fromkeys(sizes, 1) | {("720p", 64): 4, ("720p", 16): 2}


@pytest.mark.parametrize("world_size, largest", [(1, 1), (2, 2), (6, 2), (4, 4), (64, 8)])
def test_auto_evens_out_what_batches_cost(world_size, largest):
    sizes = by_entry(sequence_sizes("auto", BUCKETS, 1152, world_size))
    assert sizes[("720p", 64)] == largest == max(sizes.values())
    assert all(sizes[(name, 1)] == 1 for name in TABLE)


def test_auto_goes_by_measured_times():
    entry = Entry(1, 0, 0.5, 0.5, 0.5, 1.0, 1000, 1, 1)
    keys = [(name, frames) for name, entries in TABLE.items() for frames in entries]
    measured = {key: entry for key in keys} | {("144p", 64): replace(entry, seconds=1.4)}
    sizes = by_entry(sequence_sizes("auto", Buckets(TABLE, measured=measured), 1152, 8))
    assert sizes == dict.fromkeys(keys, 1) | {("144p", 64): 2}


@pytest.mark.parametrize(
    "setting, world_size, message",
    [
        (3, 6, "sequence_parallel = 3: use 1, 2, 4, 8, auto, or a table of such sizes"),
        (4, 6, "sequence_parallel = 4: it must divide the number of processes, 6: use 1, 2"),
        ({"720p": {64: 8}}, 4, "it must divide the number of processes, 4: use 1, 2, 4"),
        ({"720p": {32: 2}}, 4, "sequence_parallel.720p.32 = 2: there is no such bucket"),
        ({"144p": {1: 2}}, 4, "sequence_parallel.144p.1 = 2: each rank needs a frame"),
        ({"144p": 2}, 4, "sequence_parallel.144p = 2: write {number of frames: size}"),
        ({"144p": {16: "two"}}, 4, "sequence_parallel.144p.16 = 'two': use 1, 2"),
        (True, 2, "sequence_parallel = True: use 1, 2"),
    ],
)
def test_what_cannot_be_is_refused(setting, world_size, message):
    with pytest.raises(ConfigError) as caught:
        check_setting(setting)
        sequence_sizes(setting, BUCKETS, 1152, world_size)
    assert message in str(caught.value)


@pytest.mark.parametrize("drop_last", [True, False])
def test_units_are_full_and_batches_begin_where_a_group_does(drop_last):
    rng = np.random.default_rng(0)
    degrees = rng.choice([1, 1, 1, 2, 4, 8], size=301)
    order, starts = pack(degrees, 8, drop_last)
    for start, stop in zip(starts, starts[1:], strict=False):
        unit = degrees[order[start:stop]]
        assert unit.sum() == 8
        assert ((np.cumsum(unit) - unit) % unit == 0).all()
    seen = np.bincount(order, minlength=len(degrees))
    if drop_last:
        assert seen.max() == 1 and degrees[seen == 0].sum() < 8 * 3
    else:
        assert seen.min() == 1


def test_ranks_of_a_step_share_what_they_should():
    rng = np.random.default_rng(1)
    frames = rng.choice([1, 80, 400], size=4000)
    size = np.full(4000, 720), np.full(4000, 1280)
    degrees = sequence_sizes({"720p": {64: 4, 16: 2}}, BUCKETS, 1152, 8)
    options = dict(seed=0, frame_interval=1, world_size=8, degrees=degrees, grad_accumulation=2)
    samplers = [BucketSampler(frames, *size, BUCKETS, rank=rank, **options) for rank in range(8)]
    iterators = [iter(sampler) for sampler in samplers]
    kinds = set()
    for _ in range(40):
        step = [[next(iterator) for iterator in iterators] for _ in range(2)]
        requests = [request for micro in step for request in micro]
        batches = {request.index for request in requests}
        assert {request.step_batches for request in requests} == {len(batches)}
        first = {request.index: request for request in requests}
        assert {r.step_samples for r in requests} == {sum(len(r.samples) for r in first.values())}
        for micro in step:
            for rank, request in enumerate(micro):
                begin = rank - request.part
                assert begin % request.parts == 0 and request.parts == degrees[request.bucket]
                group = micro[begin : begin + request.parts]
                assert {r.index for r in group} == {request.index} and [r.part for r in group] == list(
                    range(len(group))
                )
            kinds.add(tuple(sorted({request.parts for request in micro})))
        for sampler in samplers:
            sampler.advance()
    assert any(len(kind) > 1 for kind in kinds)  # a step mixes groups of several sizes
    again = iter(samplers[3])
    assert next(again).index == next(iterators[3]).index  # the state is where the iterators are
