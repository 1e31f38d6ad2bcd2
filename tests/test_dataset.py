import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stdit_fast.errors import ConfigError
from stdit_fast.media.pixels import from_pixels
from stdit_fast.media.read import decode_clip, decode_image
from stdit_fast.train.bad_samples import BadSamples, TooManyBadSamples
from stdit_fast.train.buckets import Buckets
from stdit_fast.train.dataset import NoGoodSample, VideoTextDataset, make_loader
from stdit_fast.train.demo_data import ASPECTS, CAPTIONS, make_demo_data
from stdit_fast.train.metadata import load_metadata
from stdit_fast.train.sampler import BatchRequest, BucketSampler

DATA = Path(__file__).parent / "data"
RESOLUTIONS = {"tiny": {"pixels": 48 * 48, "sizes": {"0.50": [36, 68], "1.00": [48, 48]}}}
TABLE = {"tiny": {1: (1.0, 2), 4: (1.0, 2)}}
FRAME_INTERVAL = 3


def draw_mask(num_frames, rng):
    return rng.random(num_frames) < 0.7


def draw_timestep(rng):
    return int(rng.integers(1000))


class Data:
    """A folder with clips and stills, its table of samples and what is built from it."""

    def __init__(self, folder: Path, rows: list[str]):
        (folder / "t.csv").write_text("path,text,num_frames,height,width,fps\n" + "\n".join(rows) + "\n")
        self.metadata = load_metadata(folder / "t.csv", progress=False)
        self.buckets = Buckets(TABLE, RESOLUTIONS)

    def dataset(self, **options) -> VideoTextDataset:
        defaults = dict(seed=5, frame_interval=FRAME_INTERVAL, mask_sampler=draw_mask, timestep_sampler=draw_timestep)
        return VideoTextDataset(self.metadata, self.buckets, **(defaults | {"caption_dropout": 0.5} | options))

    def sampler(self, **options) -> BucketSampler:
        sizes = self.metadata.num_frames, self.metadata.height, self.metadata.width
        return BucketSampler(*sizes, self.buckets, **({"seed": 5, "frame_interval": FRAME_INTERVAL} | options))

    def request(self, num_frames, samples, spares=(), aspect="1.00", epoch=0) -> BatchRequest:
        bucket = [b.name for b in self.buckets].index(f"tiny-{num_frames}-{aspect}")
        samples, spares = np.array(samples, dtype=np.int64), np.array(spares, dtype=np.int64)
        return BatchRequest(epoch, 0, bucket, samples, spares, len(samples))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Data:
    """8 rows of the small clip (120 frames) and 6 stills; the clip fits the bucket of aspect ratio 1.00."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copy(DATA / "carphone_pristine.mp4", folder / "clip.mp4")
    rows = [f"clip.mp4,a man in a car {i},120,144,176,29.97" for i in range(8)]
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,noise {i},1,60,60,")
    return Data(folder, rows)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Data:
    """Rows 0, 1: a good clip; 2: corrupt; 3: vanished; 4: shorter than its row says; 5: empty; 6, 7: a good and a bad
    still.

    The table gives all sizes, so that nothing is noticed before it is decoded.
    """
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copy(DATA / "carphone_pristine.mp4", folder / "clip.mp4")
    (folder / "corrupt.mp4").write_bytes(b"no clip" * 99)
    (folder / "empty.mp4").touch()
    Image.new("RGB", (60, 60)).save(folder / "good.png")
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:60])
    names = ["clip.mp4", "clip.mp4", "corrupt.mp4", "gone.mp4", "clip.mp4", "empty.mp4"]
    rows = [f"{name},caption {i},{999999 if i == 4 else 120},144,176,24" for i, name in enumerate(names)]
    return Data(folder, [*rows, "good.png,still,1,60,60,", "bad.png,still,1,60,60,"])


def test_shapes_types_and_conditions_of_a_video_batch(good):
    batch = good.dataset(posterior_noise=True)[good.request(4, [3, 0])]
    expected = {
        "pixels": ((2, 4, 48, 48, 3), torch.uint8),
        "x_mask": ((2, 4), torch.bool),
        "timestep": ((2,), torch.int64),
        "noise": ((2, 4, 4, 6, 6), torch.float32),
        "posterior_noise": ((2, 4, 4, 6, 6), torch.float32),
        "drop_caption": ((2,), torch.bool),
        "samples": ((2,), torch.int64),
    } | {key: ((2,), torch.float32) for key in ("num_frames", "height", "width", "ar", "fps")}
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items() if torch.is_tensor(v)} == expected
    assert batch["text"] == ["a man in a car 3", "a man in a car 0"]
    assert batch["samples"].tolist() == [3, 0] and batch["bad"] == []
    assert good.buckets[batch["bucket"]].name == "tiny-4-1.00"
    assert [batch[key][0].item() for key in ("num_frames", "height", "width", "ar")] == [4, 48, 48, 1]
    assert batch["fps"].tolist() == pytest.approx([9.99, 9.99])
    assert not torch.equal(batch["noise"], batch["posterior_noise"])


def test_sizes_that_eight_does_not_divide_round_down(good):
    batch = good.dataset()[good.request(4, [0], aspect="0.50")]
    assert batch["pixels"].shape == (1, 4, 36, 68, 3) and batch["noise"].shape == (1, 4, 4, 4, 8)
    assert batch["ar"].item() == pytest.approx(36 / 68)
    assert batch["posterior_noise"] is None


def test_images_are_not_masked_and_have_their_own_frame_rate(good):
    dataset = good.dataset(mask_sampler=lambda num_frames, rng: np.zeros(num_frames, dtype=bool))
    batch = dataset[good.request(1, [8, 13])]
    assert batch["x_mask"].tolist() == [[True], [True]]
    assert batch["fps"].tolist() == [120, 120] and batch["num_frames"].tolist() == [1, 1]
    expected = decode_image(good.metadata.row(13).path, height=48, width=48)
    torch.testing.assert_close(from_pixels(batch["pixels"])[1], expected, rtol=0, atol=0)
    assert not dataset[good.request(4, [0])]["x_mask"].any()


def test_a_sample_is_the_same_in_any_batch_and_another_in_the_next_epoch(good):
    dataset = good.dataset(posterior_noise=True)
    together = dataset[good.request(4, [1, 6, 2])]
    alone = good.dataset(posterior_noise=True)[good.request(4, [6])]
    for key in ("pixels", "x_mask", "timestep", "noise", "posterior_noise", "drop_caption", "fps"):
        assert torch.equal(together[key][1], alone[key][0]), key
    later = dataset[good.request(4, [6], epoch=1)]
    other = good.dataset(seed=6)[good.request(4, [6])]
    for batch in (later, other):
        assert not torch.equal(batch["noise"], alone["noise"])
        assert not torch.equal(batch["pixels"], alone["pixels"])


def test_crops_start_anywhere_that_leaves_enough_frames(good, monkeypatch):
    starts = []

    def remember(pixels, path, indices):
        starts.append(indices[0])

    monkeypatch.setattr("stdit_fast.train.dataset.decode_frames_into", remember)
    dataset = good.dataset()
    for epoch in range(400):
        dataset[good.request(4, [0, 1, 2], epoch=epoch)]
    assert (min(starts), max(starts)) == (0, 120 - 3 * FRAME_INTERVAL - 1)
    assert np.histogram(starts, bins=5)[0].min() > 170


def test_the_crop_is_what_the_file_shows(good):
    video = from_pixels(good.dataset()[good.request(4, [2])]["pixels"])[0]
    clip = decode_clip(DATA / "carphone_pristine.mp4", start=0, num_frames=120, frame_interval=1, height=48, width=48)
    matches = [start for start in range(111) if torch.equal(video, clip[:, start : start + 10 : FRAME_INTERVAL])]
    assert len(matches) == 1


def test_random_draws_have_their_shares(good, monkeypatch):
    monkeypatch.setattr("stdit_fast.train.dataset.decode_frames_into", lambda pixels, path, indices: None)
    dataset = good.dataset(caption_dropout=0.2)
    batches = [dataset[good.request(4, list(range(8)), epoch=epoch)] for epoch in range(150)]
    dropped = torch.cat([b["drop_caption"] for b in batches]).float().mean()
    timesteps = torch.cat([b["timestep"] for b in batches]).float()
    noise = torch.cat([b["noise"].flatten() for b in batches])
    assert abs(dropped - 0.2) < 0.04
    assert abs(timesteps.mean() - 499.5) < 35 and abs(timesteps.std() - 288.7) < 15
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


@pytest.mark.parametrize("row, reason", [(2, "corrupt"), (3, "vanished"), (4, "too short"), (5, "empty")])
def test_a_bad_clip_is_replaced_by_a_spare_with_its_own_randomness(damaged, row, reason):
    dataset = damaged.dataset()
    batch = dataset[damaged.request(4, [row, 0], spares=[1])]
    assert batch["samples"].tolist() == [1, 0]
    assert batch["text"] == ["caption 1", "caption 0"]
    expected = dataset[damaged.request(4, [1])]
    assert torch.equal(batch["noise"][0], expected["noise"][0])
    assert torch.equal(batch["pixels"][0], expected["pixels"][0])
    (bad,) = batch["bad"]
    assert bad["sample"] == row and bad["path"] == damaged.metadata.row(row).path
    assert bad["reason"].startswith(reason)


def test_bad_spares_and_then_good_samples_of_the_batch(damaged):
    batch = damaged.dataset()[damaged.request(4, [2, 0], spares=[3, 4])]
    assert batch["samples"].tolist() == [0, 0]
    assert torch.equal(batch["pixels"][0], batch["pixels"][1])
    assert [bad["sample"] for bad in batch["bad"]] == [2, 3, 4]


def test_a_bad_image_is_replaced(damaged):
    batch = damaged.dataset()[damaged.request(1, [7, 6])]
    assert batch["samples"].tolist() == [6, 6] and batch["bad"][0]["sample"] == 7


def test_an_image_in_a_video_bucket_and_a_clip_in_an_image_bucket(damaged):
    batch = damaged.dataset()[damaged.request(4, [6, 0])]
    assert batch["bad"][0]["reason"] == "too short: an image, where 4 frames are needed"
    still = damaged.dataset()[damaged.request(1, [0])]
    first = decode_clip(DATA / "carphone_pristine.mp4", start=0, num_frames=1, frame_interval=1, height=48, width=48)
    assert torch.equal(from_pixels(still["pixels"])[0], first) and still["bad"] == []


def test_no_good_sample_names_the_bucket_and_the_reasons(damaged):
    with pytest.raises(NoGoodSample, match=r"tiny-4-1\.00: none of the 3 samples.*vanished: 1.*corrupt\.mp4"):
        damaged.dataset()[damaged.request(4, [2, 3], spares=[4])]


def equal(a, b) -> bool:
    return all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a if k != "request")


def test_loader_keeps_the_samplers_order_with_any_number_of_workers(good):
    sampler, dataset = good.sampler(), good.dataset(posterior_noise=True)
    expected = [dataset[request] for request in itertools.islice(sampler, 14)]
    assert expected[-1]["request"].epoch > 0
    for workers in (0, 2):
        state = torch.get_rng_state()
        loader = make_loader(dataset, sampler, num_workers=workers, pin_memory=False)
        got = list(itertools.islice(loader, 14))
        assert all(equal(a, b) for a, b in zip(expected, got, strict=True))
        assert [b["request"].index for b in got] == [b["request"].index for b in expected]
        assert torch.equal(state, torch.get_rng_state()), "the loader must leave the global generator alone"


def test_loaders_of_several_ranks_and_a_resumed_one_deliver_the_same_batches(good):
    dataset = good.dataset()
    alone = list(itertools.islice(make_loader(dataset, good.sampler(), num_workers=0, pin_memory=False), 6))
    ranks = [
        iter(make_loader(dataset, good.sampler(world_size=2, rank=rank), num_workers=0, pin_memory=False))
        for rank in range(2)
    ]
    assert all(equal(alone[i], next(ranks[i % 2])) for i in range(4))
    before = good.sampler(world_size=2)
    before.advance()
    resumed = good.sampler()
    resumed.load_state_dict(before.state_dict())
    rest = itertools.islice(make_loader(dataset, resumed, num_workers=0, pin_memory=False), 4)
    assert all(equal(a, b) for a, b in zip(alone[2:], rest, strict=True))


def test_an_error_in_a_worker_reaches_the_training(damaged):
    request = damaged.request(4, [2, 3])
    loader = make_loader(damaged.dataset(), [request], num_workers=1, pin_memory=False)
    with pytest.raises(NoGoodSample, match="tiny-4-1.00"):
        next(iter(loader))


def test_workers_outlive_signals_to_the_job_and_run_no_handler_of_the_training(good):
    handled = []
    previous = signal.signal(signal.SIGTERM, lambda *_: handled.append(os.getpid()))
    try:
        iterator = iter(make_loader(good.dataset(), good.sampler(), num_workers=1, pin_memory=False))
        first = next(iterator)
        (worker,) = iterator._workers
        # As a launcher does it: from another process than the parent.
        command = f"import os\nfor s in ({int(signal.SIGTERM)}, {int(signal.SIGINT)}): os.kill({worker.pid}, s)"
        subprocess.run([sys.executable, "-c", command], check=True)
        rest = list(itertools.islice(iterator, 5))
        assert worker.is_alive() and handled == [] and len([first, *rest]) == 6
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    finally:
        signal.signal(signal.SIGTERM, previous)


def entry(sample: int, reason: str = "corrupt: cut off") -> dict:
    return {"sample": sample, "path": f"{sample}.mp4", "reason": reason}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_samples_are_listed_once_and_counted_each_time(tmp_path):
    path = tmp_path / "run" / "bad_samples.jsonl"
    bad = BadSamples(path, 0.5)
    bad.record([], seen=8)
    assert not path.exists()
    bad.record([entry(3), entry(5, "vanished: no such file")], seen=8)
    bad.record([entry(3), entry(3), entry(7)], seen=8)
    assert lines(path) == [entry(3), entry(5, "vanished: no such file"), entry(7)]
    assert (bad.count, bad.seen) == (5, 24)
    assert bad.share == pytest.approx(5 / 29)


def test_a_restart_lists_nothing_twice_and_goes_on_counting(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    before = BadSamples(path, 0.5)
    before.record([entry(3)], seen=50)
    with open(path, "a") as file:
        file.write('{"sample": 9, "pa')  # killed while writing
    after = BadSamples(path, 0.5)
    after.load_state_dict(before.state_dict())
    after.record([entry(3), entry(9)], seen=10)
    assert (after.count, after.seen) == (3, 60)
    kept = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["sample"] for line in kept] == [3, 9]


def test_processes_that_do_not_write_count_all_the_same(tmp_path):
    bad = BadSamples(tmp_path / "b.jsonl", 0.5)
    bad.record([entry(1)], seen=3, write=False)
    assert bad.count == 1 and not (tmp_path / "b.jsonl").exists()


def test_beyond_the_share_the_run_stops_and_says_why(tmp_path):
    bad = BadSamples(tmp_path / "b.jsonl", 0.05)
    bad.record([entry(i) for i in range(6)], seen=80)  # 7 %, of too few samples to tell
    with pytest.raises(TooManyBadSamples) as caught:
        bad.record([entry(9, "vanished: no such file")], seen=20)
    message = str(caught.value)
    assert "7 of 107 samples were unusable, 6.5%" in message
    assert "dataset.max_bad_share allows 5.0%" in message
    assert "corrupt (6), vanished (1)" in message and "b.jsonl" in message
    assert len(lines(tmp_path / "b.jsonl")) == 7


def test_many_bad_samples_stop_a_run_early(tmp_path):
    bad = BadSamples(tmp_path / "b.jsonl", 0.5)
    bad.record([entry(i) for i in range(10)], seen=0)
    with pytest.raises(TooManyBadSamples, match="11 of 11"):
        bad.record([entry(10)], seen=0)
    unlimited = BadSamples(tmp_path / "c.jsonl", 1.0)
    unlimited.record([entry(i) for i in range(200)], seen=0)
    assert unlimited.share == 1


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_zero_to_one(tmp_path, share):
    with pytest.raises(ConfigError, match="max_bad_share"):
        BadSamples(tmp_path / "b.jsonl", share)


def test_the_demos_shots(tmp_path):
    """Whole, in each shape, and several times in the table."""
    table = make_demo_data(DATA, tmp_path, whole_shots=True, repeats=2)
    with open(table) as file:
        rows = [(row["path"], row["text"]) for row in csv.DictReader(file)]
    once = rows[: len(rows) // 2]
    assert once == rows[len(once) :] and len(set(once)) == len(once)
    shots = [text for texts in CAPTIONS.values() for text in texts.values()][:-2] + [
        CAPTIONS["carphone_pristine.mp4"][0]
    ]
    videos = [(path, text) for path, text in once if path.endswith("mp4")]  # one shot is too short to be used
    assert [text for _, text in videos] == [text for text in shots for _ in ASPECTS]
    metadata = load_metadata(table, progress=False)
    frames = {Path(metadata.row(i).path).name: metadata.row(i).num_frames for i in range(len(metadata))}
    assert frames["bigbuckbunny-040-wide.mp4"] == 50 and frames["carphone_pristine-000-tall.mp4"] == 120
