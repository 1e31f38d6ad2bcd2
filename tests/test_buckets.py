import json
from pathlib import Path

import numpy as np
import pytest

from stdit_fast.errors import ConfigError
from stdit_fast.resolutions import load_resolutions
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.randomness import hash_uniform

GOLDEN = json.loads((Path(__file__).parent / "data" / "buckets.json").read_text())
TABLE = {
    "144p": {1: (0.5, 48), 16: (1.0, 6), 32: (0.7, 3)},
    "256": {1: (0.5, 24), 16: (0.5, 3), 64: (0.0, None)},
    "240p": {16: (0.3, 2), 32: (0.3, 1), 64: (0.0, None)},
    "512": {1: (0.4, 12)},
}


def where(buckets, num_frames, height, width, frame_interval=1, rng=None):
    index = buckets.assign([num_frames], [height], [width], frame_interval, rng)[0]
    return None if index < 0 else buckets[index]


def random_sizes(count, seed=0):
    rng = np.random.default_rng(seed)
    num_frames = np.where(rng.random(count) < 0.3, 1, rng.integers(0, 400, count))
    return num_frames, rng.integers(0, 900, count), rng.integers(0, 1400, count)


@pytest.mark.parametrize("config", sorted(GOLDEN["configs"]))
@pytest.mark.parametrize("frame_interval", sorted({row[4] for row in GOLDEN["rows"]}))
def test_equal_to_the_original(config, frame_interval):
    table = GOLDEN["configs"][config]
    buckets = Buckets({name: {n: (1.0, 1) for n in lengths} for name, lengths in table.items()})
    rows = [row for row in GOLDEN["rows"] if row[0] == config and row[4] == frame_interval]
    assert len(rows) > 50
    num_frames, height, width = np.array([row[1:4] for row in rows]).T
    found = buckets.assign(num_frames, height, width, frame_interval)
    for row, index in zip(rows, found, strict=True):
        bucket = buckets[index] if index >= 0 else None
        got = bucket and [bucket.resolution, bucket.num_frames, bucket.aspect, bucket.num_frames]
        assert (got and [*got, bucket.height, bucket.width]) == row[5], row


def test_a_bucket_and_its_name():
    buckets = Buckets({"240p": {16: (0.5, 2)}})
    assert len(buckets) == len(list(buckets)) == 17
    bucket = where(buckets, 17, 240, 426)
    assert bucket.name == "240p-16-0.56"
    assert (bucket.height, bucket.width, bucket.keep_prob, bucket.batch_size) == (240, 426, 0.5, 2)
    assert not bucket.is_image
    assert buckets.batch_sizes.tolist() == [2] * 17


def test_siblings_differ_in_the_aspect_ratio_only():
    buckets = Buckets(TABLE)
    for i, bucket in enumerate(buckets):
        same = [
            j for j, b in enumerate(buckets) if (b.resolution, b.num_frames) == (bucket.resolution, bucket.num_frames)
        ]
        assert list(buckets.siblings(i)) == same


def test_a_sample_needs_four_fifths_of_the_pixels():
    buckets = Buckets({"256": {16: (1.0, 1)}, "144p": {16: (1.0, 1)}})
    assert where(buckets, 99, 1, 52429).resolution == "256"  # 0.8 * 65536 = 52428.8
    assert where(buckets, 99, 1, 52428).resolution == "144p"
    assert where(buckets, 99, 1, 29491) is None  # 0.8 * 36864 = 29491.2


def test_a_video_must_be_longer_than_its_bucket():
    buckets = Buckets({"144p": {16: (1.0, 1), 32: (1.0, 1)}})
    assert where(buckets, 16, 200, 200) is None
    assert where(buckets, 17, 200, 200).num_frames == 16
    assert where(buckets, 48, 200, 200, frame_interval=3) is None
    assert where(buckets, 49, 200, 200, frame_interval=3).num_frames == 16
    assert where(buckets, 97, 200, 200, frame_interval=3).num_frames == 32


def test_images_and_videos_do_not_mix():
    assert where(Buckets({"144p": {16: (1.0, 1)}}), 1, 200, 200) is None
    assert where(Buckets({"144p": {1: (1.0, 1)}}), 100, 200, 200) is None
    both = Buckets({"240p": {1: (1.0, 1)}, "144p": {16: (1.0, 1)}})
    assert where(both, 100, 400, 400).name == "144p-16-1.00"
    assert where(both, 1, 400, 400, frame_interval=3).name == "240p-1-1.00"


def test_keep_prob_zero_sends_on_to_smaller_resolutions_only():
    buckets = Buckets({"240p": {16: (1.0, 1), 64: (0.0, None)}, "144p": {16: (1.0, 1)}})
    assert where(buckets, 60, 400, 400).name == "240p-16-1.00"
    assert where(buckets, 65, 400, 400).name == "144p-16-1.00"
    assert all(bucket.keep_prob > 0 for bucket in buckets)


def test_the_first_aspect_wins_a_tie():
    sizes = {"2.0": [40, 20], "1.0": [30, 30], "0.5": [20, 40]}
    own = {"small": {"pixels": 800, "sizes": sizes}}
    buckets = Buckets({"small": {1: (1.0, 1)}}, own)
    assert where(buckets, 1, 60, 40).aspect == "2.0"  # 1.5 lies between 2.0 and 1.0
    assert where(buckets, 1, 30, 40).aspect == "1.0"  # 0.75 between 1.0 and 0.5
    own["small"]["sizes"] = dict(reversed(sizes.items()))
    buckets = Buckets({"small": {1: (1.0, 1)}}, own)
    assert where(buckets, 1, 60, 40).aspect == "1.0"
    assert where(buckets, 1, 30, 40).aspect == "0.5"


def reference_assign(table, sizes, draws):
    """The definition, one sample at a time; `draws[row, level]` decides on keep_prob."""
    resolutions = load_resolutions()
    result = []
    for row, (length, height, width) in enumerate(zip(*sizes, strict=True)):
        found = None
        for level, name in enumerate(sorted(table, key=lambda name: -resolutions[name]["pixels"])):
            if min(length, height, width) < 1 or height * width < 0.8 * resolutions[name]["pixels"]:
                continue
            fits = [n for n in table[name] if (length == n == 1) or (length > n != 1 and length != 1)]
            if not fits or not draws[row, level] < table[name][max(fits)][0]:
                continue
            aspects = list(resolutions[name]["sizes"])
            closest = min(range(len(aspects)), key=lambda i: (abs(float(aspects[i]) - height / width), i))
            found = f"{name}-{max(fits)}-{aspects[closest]}"
            break
        result.append(found)
    return result


def test_assignment_with_keep_prob_equals_the_definition():
    sizes = random_sizes(3000)
    draws = np.stack([hash_uniform(1, 2, np.arange(3000), level) for level in range(4)], axis=1)
    buckets = Buckets(TABLE)
    found = buckets.assign(*sizes, rng=lambda rows, level: draws[rows, level])
    assert [buckets[i].name if i >= 0 else None for i in found] == reference_assign(TABLE, sizes, draws)


def test_keep_prob_is_the_share_that_is_kept():
    buckets = Buckets({"240p": {16: (0.3, 1)}, "144p": {16: (0.5, 1)}})
    sizes = [np.full(20000, n) for n in (50, 400, 400)]
    everything = buckets.assign(*sizes)
    assert (everything == everything[0]).all() and buckets[everything[0]].resolution == "240p"
    found = buckets.assign(*sizes, rng=np.random.default_rng(0))
    shares = [np.mean([i >= 0 and buckets[i].resolution == name for i in found]) for name in ("240p", "144p")]
    np.testing.assert_allclose(shares, [0.3, 0.7 * 0.5], atol=0.015)
    np.testing.assert_array_equal(found, buckets.assign(*sizes, rng=np.random.default_rng(0)))


def test_chunks_do_not_show(monkeypatch):
    buckets, sizes = Buckets(TABLE), random_sizes(5000)

    def draw(rows, level):
        return hash_uniform(0, 0, rows, level)

    whole = buckets.assign(*sizes, rng=draw)
    counted = buckets.count_misfits(*sizes, 1, whole)
    monkeypatch.setattr("stdit_fast.train.buckets.CHUNK", 37)
    np.testing.assert_array_equal(whole, buckets.assign(*sizes, rng=draw))
    assert counted == buckets.count_misfits(*sizes, 1, whole)


def test_samples_without_a_size_belong_nowhere():
    buckets = Buckets({"144p": {1: (1.0, 1), 16: (1.0, 1)}})
    num_frames, height, width = [0, 1, 20, 1, -5], [300, 0, -300, 300, 300], [300, 300, -300, 300, 300]
    assert (buckets.assign(num_frames, height, width) >= 0).tolist() == [False, False, False, True, False]


def test_misfits_are_counted_by_reason():
    buckets = Buckets({"240p": {1: (1.0, 1)}, "144p": {16: (0.5, 1), 32: (0.0, None)}})
    samples = [
        (0, 0, 0),  # unreadable
        (20, 100, 100),  # too small
        (1, 180, 200),  # only for 144p, which takes no images
        (16, 400, 400),  # too short
        (20, 400, 400),  # fits
        (40, 400, 400),  # meets keep_prob 0
    ]
    sizes = np.array(samples).T
    found = buckets.assign(*sizes, rng=lambda rows, level: np.ones(len(rows)))
    assert buckets.count_misfits(*sizes, 1, found) == {
        "unreadable: no frames or no size known": 1,
        "too small for the smallest resolution": 1,
        "image, but no resolution of its size takes images": 1,
        "too short for the shortest length at its size": 2,
        "left out in this epoch by keep_prob": 1,
    }
    only_images = Buckets({"240p": {1: (1.0, 1)}})
    assert only_images.count_misfits([20], [400], [400], 1, np.array([-1])) == {
        "video, but no resolution of its size takes videos": 1
    }


def test_requirements_are_said_in_words():
    buckets = Buckets(
        {"144p": {1: (1.0, 1), 16: (1.0, 1), 32: (1.0, 1)}, "240p": {32: (0.0, None)}, "512": {16: (1, 1)}}
    )
    assert buckets.requirements(frame_interval=3).splitlines() == [
        "512: height*width >= 209716, videos of more than 48 frames",
        "144p: height*width >= 29492, images or videos of more than 48 frames",
    ]


def test_tables_as_yaml_gives_them():
    plain = Buckets({"256": {16: (0.5, 2), 1: (1.0, 4)}})
    yaml = Buckets({256: {"16": [0.5, 2], "1": [1, 4]}})
    assert list(plain) == list(yaml)


def test_own_resolutions_extend_and_override(tmp_path):
    own = {
        "mine": {"pixels": 40000, "sizes": {"1.0": [200, 200]}},
        "144p": {"pixels": 10000, "sizes": {"1.0": [96, 104]}},
    }
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(own))
    for resolutions in (own, path, str(path)):
        buckets = Buckets({"144p": {1: (1, 1)}, "mine": {1: (1, 1)}, "240p": {1: (1, 1)}}, resolutions)
        assert [b.name for b in buckets][-2:] == ["mine-1-1.0", "144p-1-1.0"]
        assert where(buckets, 1, 100, 100).width == 104
        assert where(buckets, 1, 320, 320).name == "240p-1-1.00"


def test_shipped_tables_are_found_by_name_and_own_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(Buckets({"144p": {1: (1, 1)}}, "resolutions.json")) == 17
    (tmp_path / "resolutions.json").write_text('{"144p": {"pixels": 36864, "sizes": {"1.0": [192, 192]}}}')
    assert len(Buckets({"144p": {1: (1, 1)}}, "resolutions.json")) == 1


@pytest.mark.parametrize(
    "table, message",
    [
        ({}, "at least one"),
        ({"241p": {16: (1.0, 2)}}, "'241p': there is no such resolution: did you mean '240p'"),
        ({256: {16: (1.0, 2)}, "256": {1: (1.0, 2)}}, "a resolution stands there twice"),
        ({"240p": {}}, r"buckets\.240p = \{\}"),
        ({"240p": {16: (1.5, 2)}}, r"buckets\.240p\.16 = 1\.5: keep_prob.*between 0 and 1"),
        ({"240p": {16: (-0.1, 2)}}, "between 0 and 1"),
        ({"240p": {16: (float("nan"), 2)}}, "between 0 and 1"),
        ({"240p": {16: ("1", 2)}}, "between 0 and 1"),
        ({"240p": {16: (True, 2)}}, "between 0 and 1"),
        ({"240p": {16: (0.5, None)}}, r"buckets\.240p\.16.*batch size is missing"),
        ({"240p": {16: (0.5, 0)}}, "batch size.*at least 1"),
        ({"240p": {16: (0.5, 1.5)}}, "batch size.*at least 1"),
        ({"240p": {16: 0.5}}, r"\[keep_prob, batch_size\]"),
        ({"240p": {0: (1.0, 2)}}, "number of frames.*at least 1"),
        ({"240p": {"x": (1.0, 2)}}, "number of frames.*at least 1"),
        ({"240p": {16: (1.0, 2), "16": (1.0, 2)}}, "twice"),
        ({"240p": {16: (0.0, None)}}, "no entry keeps anything"),
    ],
)
def test_bad_tables(table, message):
    with pytest.raises(ConfigError, match=message):
        Buckets(table)


@pytest.mark.parametrize(
    "resolutions, message",
    [
        ("nowhere.json", "no such file"),
        ({"a": {"pixels": 5}}, r"resolutions\.a"),
        ({"a": {"pixels": 0, "sizes": {"1": [8, 8]}}}, r"resolutions\.a\.pixels"),
        ({"a": {"pixels": 64, "sizes": {}}}, "must map aspect ratios"),
        ({"a": {"pixels": 64, "sizes": {"wide": [8, 8]}}}, "'wide'.*aspect ratio"),
        ({"a": {"pixels": 64, "sizes": {"1": [8, 4]}}}, r"\[height, width\]"),
    ],
)
def test_bad_resolutions(resolutions, message):
    with pytest.raises(ConfigError, match=message):
        Buckets({"144p": {1: (1, 1)}}, resolutions)


def test_resolutions_file_that_is_no_table(tmp_path):
    for content, message in [("{", "cannot be read as JSON"), ("[]", "must hold")]:
        (tmp_path / "own.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            Buckets({"144p": {1: (1, 1)}}, tmp_path / "own.json")


def test_frame_interval_below_one():
    with pytest.raises(ConfigError, match="frame_interval = 0"):
        Buckets({"144p": {1: (1, 1)}}).assign([1], [200], [200], 0)
