import itertools
import logging
import pickle
from collections import Counter

import numpy as np
import pytest

from stdit_fast.errors import ConfigError
from stdit_fast.train.balance import balanced_order, imbalance
from stdit_fast.train.bucket_tables import Entry
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.sampler import BucketSampler

TABLE = {"240p": {16: (0.5, 2)}, "144p": {1: (1.0, 4), 16: (1.0, 3)}}


def make_sizes(count=400, seed=0):
    rng = np.random.default_rng(seed)
    num_frames = np.where(rng.random(count) < 0.4, 1, rng.integers(10, 100, count))
    return num_frames, rng.integers(150, 400, count), rng.integers(200, 500, count)


SIZES = make_sizes()
BUCKETS = Buckets(TABLE)


def make(sizes=SIZES, buckets=BUCKETS, **options):
    return BucketSampler(*sizes, buckets, **{"seed": 3} | options)


def steps_of(count, **options):
    """The first `count` optimizer steps over all ranks: [step][micro-batch][rank] -> request."""
    world_size, accumulation = options.get("world_size", 1), options.get("grad_accumulation", 1)
    ranks = [iter(make(rank=rank, **options)) for rank in range(world_size)]
    return [[[next(rank) for rank in ranks] for _ in range(accumulation)] for _ in range(count)]


def flat(steps):
    return [request for step in steps for micro in step for request in micro]


def key(request):
    return request.epoch, request.index, request.bucket, request.samples.tolist(), request.spares.tolist()


def one_epoch(sampler):
    plan = sampler.plan(0)
    return [plan.samples(i) for i in range(len(plan))]


def test_a_batch_is_of_one_bucket_and_full():
    sampler = make()
    entered = {}  # without keep_prob draws, by resolution: where a sample belongs once it is kept there
    for name in TABLE:
        alone = Buckets({name: TABLE[name]})
        entered[name] = [alone[i].name if i >= 0 else None for i in alone.assign(*SIZES)]
    shown = set()
    for request in itertools.islice(sampler, sampler.steps_per_epoch(0)):
        bucket = BUCKETS[request.bucket]
        shown.add((bucket.resolution, bucket.num_frames))
        assert len(request.samples) == bucket.batch_size and request.samples.dtype == np.int64
        assert {entered[bucket.resolution][i] for i in request.samples} == {bucket.name}
    assert shown == {("240p", 16), ("144p", 1), ("144p", 16)}


def test_an_epoch_shows_each_sample_once():
    sampler = make()
    plan = sampler.plan(0)
    seen = Counter(np.concatenate(one_epoch(sampler)).tolist())
    assert set(seen.values()) == {1}
    left_over = sum(row.left_over for row in plan.report(BUCKETS))
    assert left_over > 0
    assert len(seen) + left_over + sum(plan.misfits.values()) == 400


def test_order_follows_from_seed_and_epoch():
    first = [key(r) for r in itertools.islice(make(), 50)]
    assert first == [key(r) for r in itertools.islice(make(), 50)]
    assert first != [key(r) for r in itertools.islice(make(seed=4), 50)]
    plan = make().plan
    assert set(map(tuple, one_epoch(make()))) != {tuple(plan(1).samples(i)) for i in range(len(plan(1)))}


def test_keep_prob_is_drawn_anew_each_epoch():
    sampler = make()
    large = [
        {int(i) for b, bucket in enumerate(BUCKETS) if bucket.resolution == "240p" for i in plan.members(b)}
        for plan in (sampler.plan(0), sampler.plan(1))
    ]
    assert large[0] != large[1]
    assert len(large[0] & large[1]) < 0.7 * len(large[0])


@pytest.mark.parametrize("world_size, grad_accumulation", [(2, 1), (1, 2), (3, 2), (4, 1)])
def test_the_same_global_batches_on_any_world(world_size, grad_accumulation):
    alone = [key(r) for r in itertools.islice(make(), 24)]
    count = 24 // (world_size * grad_accumulation)
    steps = steps_of(count, world_size=world_size, grad_accumulation=grad_accumulation)
    assert [key(r) for r in flat(steps)] == alone[: len(flat(steps))]


def test_ranks_get_different_data():
    first, second = (list(itertools.islice(make(world_size=2, rank=rank), 20)) for rank in range(2))
    shown = [set(np.concatenate([r.samples for r in each]).tolist()) for each in (first, second)]
    assert not shown[0] & shown[1]


def test_a_step_counts_its_samples_over_ranks_and_micro_batches():
    sizes = set()
    for step in steps_of(10, world_size=3, grad_accumulation=2):
        total = sum(len(request.samples) for micro in step for request in micro)
        assert {request.step_samples for micro in step for request in micro} == {total}
        sizes.add(total)
    assert len(sizes) > 1


def test_iteration_is_endless_and_leaves_the_state_alone():
    sampler = make(world_size=2)
    per_epoch = sampler.steps_per_epoch(0)
    requests = list(itertools.islice(sampler, per_epoch + 3))
    assert [r.epoch for r in requests] == [0] * per_epoch + [1] * 3
    assert sampler.state_dict()["epoch"] == sampler.state_dict()["position"] == 0
    for _ in range(per_epoch + 2):
        sampler.advance()
    assert (sampler.epoch, sampler.position) == (1, 4)
    assert key(next(iter(sampler))) == key(requests[per_epoch + 2])


def test_resume_in_mid_epoch_on_another_number_of_ranks():
    alone = [key(r) for r in itertools.islice(make(), 60)]
    sampler = make(world_size=2, grad_accumulation=3)
    for _ in range(4):
        sampler.advance()
    state = sampler.state_dict()
    assert all(isinstance(value, int) for value in state.values()) and len(state) <= 5
    resumed = [make(world_size=3, rank=rank) for rank in range(3)]
    for each in resumed:
        each.load_state_dict(state)
    got = [key(r) for step in zip(*(itertools.islice(each, 5) for each in resumed), strict=True) for r in step]
    assert got == alone[24 : 24 + 15]


def test_a_rest_that_feeds_no_step_on_the_new_world_is_passed_over():
    sampler = make()
    batches = len(sampler.plan(0))
    sampler.load_state_dict({"seed": 3, "epoch": 0, "position": batches - 1})
    assert (sampler.epoch, sampler.position) == (0, batches - 1)
    wide = make(world_size=4)
    wide.load_state_dict(sampler.state_dict())
    assert (wide.epoch, wide.position) == (1, 0)


def test_state_of_another_seed_or_of_other_data(caplog):
    sampler = make()
    sampler.advance()
    state = sampler.state_dict()
    with pytest.raises(ConfigError, match="seed = 5: the checkpoint was trained with 3"):
        make(seed=5).load_state_dict(state)
    other = make(sizes=make_sizes(300))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(state)
    assert (other.epoch, other.position) == (0, 0)
    assert "begins" in caplog.text


def test_drop_last_leaves_out_what_is_incomplete():
    sampler = make(world_size=4)
    plan = sampler.plan(0)
    for row in plan.report(BUCKETS):
        size = next(b.batch_size for b in BUCKETS if b.name == row.name)
        assert (row.batches, row.left_over) == divmod(row.samples, size)
    assert sampler.steps_per_epoch(0) == len(plan) // 4


def test_without_drop_last_every_sample_is_shown_and_batches_are_filled_up():
    dropping, filling = make(), make(drop_last=False)
    plan = filling.plan(0)
    seen = Counter(np.concatenate(one_epoch(filling)).tolist())
    assert len(seen) + sum(plan.misfits.values()) == 400
    assert all(row.left_over == 0 for row in plan.report(BUCKETS))
    for row in plan.report(BUCKETS):
        bucket = next(i for i, b in enumerate(BUCKETS) if b.name == row.name)
        size = BUCKETS[bucket].batch_size
        assert row.batches == -(-row.samples // size)
        counts = [seen[i] for i in plan.members(bucket).tolist()]
        assert sum(counts) == row.batches * size and max(counts) - min(counts) <= 1
    assert len(plan) > len(dropping.plan(0))
    assert all(len(r.samples) == BUCKETS[r.bucket].batch_size for r in itertools.islice(filling, len(plan)))


def test_without_drop_last_the_last_step_repeats_the_first_batches():
    sampler = make(drop_last=False, world_size=4, rank=3)
    batches = len(sampler.plan(0))
    assert batches % 4, "the data must leave an incomplete step for this test"
    steps = sampler.steps_per_epoch(0)
    assert steps == batches // 4 + 1
    requests = list(itertools.islice(sampler, steps + 1))
    assert requests[steps - 1].index == (4 * steps - 1) % batches < 4
    assert [r.epoch for r in requests[-2:]] == [0, 1]
    for _ in range(steps):
        sampler.advance()
    assert (sampler.epoch, sampler.position) == (1, 0)


def test_without_drop_last_one_sample_feeds_any_world():
    sampler = make(([1], [200], [200]), world_size=4, rank=2, drop_last=False)
    requests = list(itertools.islice(sampler, 3))
    assert [r.samples.tolist() for r in requests] == [[0] * 4] * 3
    assert [r.epoch for r in requests] == [0, 1, 2]
    assert requests[0].spares.tolist() == []


def test_spares_are_other_members_of_the_bucket_then_of_its_siblings():
    sampler = make()
    plan = sampler.plan(0)
    names = {int(i): bucket.name for b, bucket in enumerate(BUCKETS) for i in plan.members(b)}
    own = siblings = 0
    for request in itertools.islice(sampler, len(plan)):
        bucket, spares = BUCKETS[request.bucket], request.spares.tolist()
        assert len(set(spares) - set(request.samples.tolist())) == len(spares) == 16
        of_bucket = [names[i] == bucket.name for i in spares]
        others = len(plan.members(request.bucket)) - len(request.samples)
        assert of_bucket == [i < others for i in range(16)]
        assert all(names[i].startswith(f"{bucket.resolution}-{bucket.num_frames}-") for i in spares)
        own += sum(of_bucket)
        siblings += 16 - sum(of_bucket)
    assert own > 0 and siblings > 0


def test_requests_are_small_and_can_be_pickled():
    request = next(iter(make()))
    data = pickle.dumps(request)
    assert len(data) < 1500
    assert key(pickle.loads(data)) == key(request)


def test_report_flags_nearly_empty_buckets():
    # 240x426: 0.56; 320x320: 1.00
    shapes = [(240, 426)] * 5 + [(320, 320)] * 3 + [(426, 240)] * 1
    num_frames = np.full(len(shapes) + 1, 20)
    height, width = np.array(shapes + [(10, 10)]).T
    buckets = Buckets({"240p": {16: (1.0, 2), 64: (1.0, 1)}})
    plan = make((num_frames, height, width), buckets).plan(0)
    assert [tuple(row) for row in plan.report(buckets)] == [
        ("240p-16-0.56", 5, 2, 1, False),
        ("240p-16-1.00", 3, 1, 1, True),
        ("240p-16-1.78", 1, 0, 1, True),
    ]
    text = plan.describe(buckets)
    assert "240p-16-1.78: 1 samples, 0 batches, 1 left over (nearly empty)" in text
    assert "240p-16-0.56: 5 samples, 2 batches, 1 left over\n" in text
    assert "240p-64: no samples" in text
    assert "in no bucket, too small for the smallest resolution: 1" in text


def test_no_sample_fits_says_what_there_is_and_what_is_needed():
    buckets = Buckets({"1080p": {16: (1.0, 1)}})
    sizes = [120, 132, 250], [144, 720, 272], [176, 1280, 640]
    with pytest.raises(ConfigError) as caught:
        make(sizes, buckets, frame_interval=3)
    message = str(caught.value)
    assert "none of the 3 samples fits a bucket" in message
    assert "144x176, 272x640, 720x1280 pixels" in message
    assert "120, 132, 250 frames" in message
    assert "1080p: height*width >= 1658880, videos of more than 48 frames" in message
    assert "too small for the smallest resolution: 3" in message


def test_no_full_batch_says_which_bucket_needs_how_many():
    buckets = Buckets({"240p": {16: (1.0, 4)}, "144p": {1: (1.0, 9)}})
    sizes = [20, 20, 20, 1], [240, 240, 240, 200], [426, 426, 426, 200]
    with pytest.raises(ConfigError) as caught:
        make(sizes, buckets)
    message = str(caught.value)
    assert "240p-16-0.56 needs 4 samples and has 3" in message
    assert "144p-1-1.00 needs 9 samples and has 1" in message
    assert "drop_last" in message
    assert len(make(sizes, buckets, drop_last=False).plan(0)) == 2


def test_a_world_that_the_data_cannot_feed():
    sizes = np.full(7, 20), np.full(7, 240), np.full(7, 426)
    buckets = Buckets({"240p": {16: (1.0, 2)}})
    assert make(sizes, buckets, world_size=3).steps_per_epoch(0) == 1
    with pytest.raises(ConfigError, match=r"world_size = 2: .* 2 \* 2 = 4 batches, and epoch 0 has 3.*drop_last"):
        make(sizes, buckets, world_size=2, grad_accumulation=2)


def test_an_epoch_that_turns_out_empty_ends_with_an_error():
    buckets = Buckets({"240p": {16: (0.01, 1)}})
    sizes = [20] * 5, [240] * 5, [426] * 5
    seed = next(seed for seed in range(1000) if not _raises(sizes, buckets, seed))
    sampler = make(sizes, buckets, seed=seed)
    with pytest.raises(ConfigError, match="none of the 5 samples fits.*left out in this epoch by keep_prob: 5"):
        list(itertools.islice(sampler, 1000))


def _raises(sizes, buckets, seed):
    try:
        make(sizes, buckets, seed=seed)
    except ConfigError:
        return True
    return False


@pytest.mark.parametrize(
    "options, message", [({"rank": 2, "world_size": 2}, "rank"), ({"grad_accumulation": 0}, "grad")]
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


# ------------------------------------------------------------------ balance


def measured(times: dict, sizes: dict | None = None) -> Buckets:
    """The buckets above, as if measured: (resolution, frames) -> seconds."""
    entries = {
        key: Entry((sizes or {}).get(key, TABLE[key[0]][key[1]][1]), 0, t, t, t, 1.0, 1, 8, 8)
        for key, t in times.items()
    }
    return Buckets(TABLE, measured=entries)


TIMES = {("240p", 16): 1.0, ("144p", 1): 0.4, ("144p", 16): 2.0}


def seconds_of(steps, buckets):
    """[steps, micro-batches, ranks]"""
    return np.array([[[buckets[r.bucket].seconds for r in micro] for micro in step] for step in steps])


def test_balance_groups_batches_of_like_times_and_loses_none():
    rng = np.random.default_rng(0)
    seconds = rng.choice([0.5, 1.0, 1.01, 3.0], 1003)
    order = balanced_order(seconds, 8, np.random.default_rng(1))
    assert sorted(order) == list(range(1003)) and list(order[1000:]) == [1000, 1001, 1002]
    groups = seconds[order[:1000]].reshape(-1, 8)
    assert imbalance(groups) < 0.03 and imbalance(seconds[:1000].reshape(-1, 8)) > 0.8
    assert len({tuple(g) for g in groups[:20]}) > 4, "groups are shuffled"
    mixed = [g for g in groups if 1.0 in g and 1.01 in g]
    assert len(mixed) > 20, "times that hardly differ mix"
    assert list(balanced_order(seconds, 1, rng)) == list(range(1003))
    assert list(balanced_order(seconds[:5], 8, rng)) == list(range(5))


def test_ranks_of_a_step_take_about_as_long_where_times_are_known():
    buckets = measured(TIMES)
    options = {"world_size": 4, "grad_accumulation": 2, "sizes": make_sizes(3000)}
    count = make(buckets=buckets, **options).steps_per_epoch(0)
    even, uneven = (steps_of(count, buckets=b, **options) for b in (buckets, BUCKETS))
    waiting = imbalance(seconds_of(even, buckets).reshape(-1, 4))
    assert waiting < 0.05 and imbalance(seconds_of(uneven, buckets).reshape(-1, 4)) > 0.2
    for step in even:
        expected = imbalance(seconds_of([step], buckets)[0])
        assert all(r.imbalance == pytest.approx(expected) for micro in step for r in micro)
    assert all(r.imbalance == 0 for r in flat(uneven))
    shown = [tuple(r.samples) for r in flat(even)]
    assert len(set(shown)) == len(shown)
    assert [key(r) for r in flat(even)] == [key(r) for r in flat(steps_of(count, buckets=buckets, **options))]


def test_a_resumed_epoch_keeps_its_arrangement_on_another_number_of_ranks(caplog):
    buckets, sizes = measured(TIMES), make_sizes(3000)
    whole = [key(r) for r in flat(steps_of(12, buckets=buckets, sizes=sizes, world_size=4))]
    sampler = make(buckets=buckets, sizes=sizes, world_size=4)
    for _ in range(3):
        sampler.advance()
    state = sampler.state_dict()
    other = make(buckets=buckets, sizes=sizes, world_size=2, rank=0)
    other.load_state_dict(state)
    assert [key(r) for r in itertools.islice(other, 8)] == whole[12:28:2]
    assert (
        other.plan(1).batch_bucket.tolist()
        == make(buckets=buckets, sizes=sizes, world_size=2).plan(1).batch_bucket.tolist()
    )
    for changed in (BUCKETS, measured(TIMES, {("144p", 16): 5}), measured(TIMES | {("144p", 16): 2.5})):
        caplog.clear()
        new = make(buckets=changed, sizes=sizes, world_size=4)
        new.load_state_dict(state)
        assert new.position == 0 and "begins" in caplog.text


def test_balance_holds_where_ranks_share_batches():
    buckets, sizes = measured(TIMES), make_sizes(3000)
    degrees = np.array([2 if (b.resolution, b.num_frames) == ("144p", 16) else 1 for b in buckets])
    options = {"buckets": buckets, "sizes": sizes, "world_size": 4, "degrees": degrees}
    count = make(**options).steps_per_epoch(0)
    steps = steps_of(count, **options)
    shared = [[[buckets[r.bucket].seconds / r.parts for r in micro] for micro in step] for step in steps]
    assert imbalance(np.array(shared).reshape(-1, 4)) < 0.05, "144p-16 takes 1 s on two ranks, as 240p-16 does on one"
    assert {r.parts for r in flat(steps)} == {1, 2} and {r.part for r in flat(steps) if r.parts == 2} == {0, 1}
    shown = Counter(tuple(r.samples) for r in flat(steps) if r.part == 0)
    assert set(shown.values()) == {1}
