"""Tables of measured batch sizes: found by GPU, held against the run, used by the buckets and the configuration."""

import dataclasses
from pathlib import Path

import pytest
import torch

from stdit_fast.errors import ConfigError
from stdit_fast.train import bucket_tables, config
from stdit_fast.train.bucket_tables import BucketTable, Entry, Run, find, folder_name, read, write

MODEL = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "mlp_ratio": 4.0}
ENTRIES = {
    ("240p", 16): Entry(10, 8, 0.8, 0.79, 0.81, 70.0, 64000, 240, 426),
    ("144p", 1): Entry(300, 20, 0.75, 0.74, 0.76, 72.0, 45000, 144, 256),
}
TABLE = BucketTable("Some GPU 80GB", 79.2, 1, False, 0.8, MODEL, 200, ENTRIES, {"torch": "2.11"}, "2026-11-26", "sweep")
RUN = Run("Some GPU 80GB", 79.1, 8, False, MODEL, 200, tuple(ENTRIES))


def put(folder: Path, name: str, **changes) -> Path:
    write(folder / f"{name}.yaml", dataclasses.replace(TABLE, **changes))
    return folder / f"{name}.yaml"


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = read(put(tmp_path, "a"))
    assert dataclasses.replace(table, path=None) == TABLE and table.path == tmp_path / "a.yaml"
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]
    assert "Some GPU 80GB" in table.describe() and "features" in table.describe()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("[1]", "no table of bucket sizes"),
        ("format: 2", "of format 1"),
        ("format: 1", "no whole table"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(path)


def test_impossible_entries_are_refused(tmp_path):
    for key, value in (("batch_size", 0), ("checkpointed", -1), ("seconds", 0.0), ("batch_size", 1.5)):
        entry = dataclasses.replace(ENTRIES["240p", 16], **{key: value})
        path = put(tmp_path, "a", buckets=ENTRIES | {("240p", 16): entry})
        with pytest.raises(ConfigError, match=rf"240p\.16\.{key}"):
            read(path)


def test_the_users_table_comes_before_the_shipped_one_and_the_gpu_decides(tmp_path):
    mine, shipped = tmp_path / "mine", tmp_path / "shipped"
    put(shipped, "here")
    put(shipped, "elsewhere", device="Other GPU")
    assert find(RUN, (mine, shipped)).path == shipped / "here.yaml"
    put(mine / "deep", "own")
    assert find(RUN, (mine, shipped)).path == mine / "deep" / "own.yaml"


def test_of_several_the_one_for_most_ranks_then_the_closest_then_the_newest(tmp_path):
    put(tmp_path, "a")
    put(tmp_path, "many", buckets=ENTRIES | {("1024", 1): ENTRIES["144p", 1]}, date="2026-12-30")
    assert find(RUN, [tmp_path]).path.stem == "a"
    put(tmp_path, "new", date="2026-12-24")
    assert find(RUN, [tmp_path]).path.stem == "new"
    put(tmp_path, "over8", world_size=8)
    assert find(RUN, [tmp_path]).path.stem == "over8"
    assert find(dataclasses.replace(RUN, world_size=4), [tmp_path]).path.stem == "new"


def test_another_gpu_with_no_more_memory_serves_with_a_warning(tmp_path, caplog):
    put(tmp_path, "small", memory_gib=40.0, device="Small GPU")
    put(tmp_path, "middle", device="Middle GPU")
    put(tmp_path, "large", memory_gib=139.0, device="Large GPU")
    found = find(dataclasses.replace(RUN, device="New GPU", memory_gib=94.0), [tmp_path])
    assert found.path.stem == "middle" and "times will differ" in caplog.text
    with pytest.raises(ConfigError, match="(?s)no table is for this run on New GPU with 24 GiB.*sweep.*Small GPU"):
        find(dataclasses.replace(RUN, device="New GPU", memory_gib=24.0), [tmp_path])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoders": True}, "for runs with features, and this is one with encoders"),
        ({"text_tokens": 300}, "captions of 200 tokens"),
        ({"model": MODEL | {"depth": 12}}, "model.depth 28, and the run has 12"),
        ({"wanted": (("720p", 16), ("240p", 16))}, "does not know 720p-16"),
        ({"device": None}, "there is no GPU to match"),
    ],
)
def test_a_run_that_no_table_fits_is_told_why(tmp_path, changes, message):
    put(tmp_path, "a")
    with pytest.raises(ConfigError, match=message):
        find(dataclasses.replace(RUN, **changes), [tmp_path])


def test_a_table_for_more_ranks_does_not_fit(tmp_path):
    put(tmp_path, "b", world_size=16)
    with pytest.raises(ConfigError, match="16 ranks or more, and there are 8"):
        find(RUN, [tmp_path])


def test_folders_are_named_after_gpus():
    assert folder_name("NVIDIA H100 80GB HBM3", 79.18) == "h100-80gb"
    assert folder_name("NVIDIA H200", 139.8) == "h200-141gb"
    assert folder_name("NVIDIA H800", 79.2) == "h800-80gb"


# ------------------------------------------------------------------ in the configuration

CONFIG = Path(config.__file__).with_name("configs") / "stage2.yaml"


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """As if this were the table's GPU; a user's folder with a table of every bucket of stage 2."""
    monkeypatch.setattr(config, "_gpu", lambda: ("Some GPU 80GB", 79.2))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bucket_tables, "SHIPPED", tmp_path / "none")
    wanted = config._kept(config.parse(["--config", str(CONFIG)], checked=False).buckets)
    entries = {
        key: dataclasses.replace(ENTRIES["240p", 16], batch_size=i + 1, pieces=2) for i, key in enumerate(wanted)
    }
    return put(bucket_tables.user_folder() / "some-gpu", "stage2", buckets=entries, encoders=True), entries


def parse(*arguments: str, table: Path):
    return config.parse(["--config", str(CONFIG), "--dataset.data_path", str(table), *arguments])


@pytest.mark.parametrize("arguments", [["--buckets", "auto"], ["--buckets=auto"], ["--bucket_sizes", "auto"]])
def test_buckets_auto_takes_sizes_from_the_table_and_all_else_from_the_config(on_a_gpu, arguments):
    path, entries = on_a_gpu
    parsed = parse(*arguments, table=path)
    plain = parse(table=path)
    assert parsed.buckets == plain.buckets and parsed.bucket_sizes == "auto" and plain.bucket_sizes == "config"
    buckets = config.make_buckets(parsed)
    for bucket, before in zip(buckets, config.make_buckets(plain), strict=True):
        entry = entries[bucket.resolution, bucket.num_frames]
        assert (bucket.batch_size, bucket.checkpointed, bucket.seconds) == (entry.batch_size, 8, 0.8)
        assert bucket.pieces == 2 and before.pieces == 1
        assert bucket.keep_prob == before.keep_prob and before.checkpointed is None and before.seconds is None
    assert buckets.seconds.tolist() == [0.8] * len(buckets) and config.make_buckets(plain).seconds is None


def test_a_table_by_its_path_and_one_that_does_not_fit(on_a_gpu, tmp_path):
    path, entries = on_a_gpu
    assert config.size_table(parse("--bucket_sizes", str(path), table=path)).path == path
    with pytest.raises(ConfigError, match="for runs with encoders in the step, and this is one with features"):
        parse("--bucket_sizes", str(path), "--features.path", str(tmp_path), table=path)
    with pytest.raises(ConfigError, match="bucket_sizes = 'no.yaml'"):
        parse("--bucket_sizes", "no.yaml", table=path)


def test_auto_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = tmp_path / "t.csv"
    table.write_text("path,text\n")
    with pytest.raises(ConfigError, match="bucket_sizes = 'auto': there is no GPU to match"):
        parse("--buckets", "auto", table=table)


def test_a_measured_size_stands_in_for_a_missing_one():
    from stdit_fast.train.buckets import Buckets

    table = {"240p": {16: [0.5, None]}}
    assert Buckets(table, measured=ENTRIES)[0].batch_size == 10
    with pytest.raises(ConfigError, match="the batch size is missing"):
        Buckets(table)


@pytest.mark.parametrize(
    "path", sorted(bucket_tables.SHIPPED.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_shipped_tables_serve_their_stage(path):
    table = read(path)
    stage = path.stem.removesuffix("-encoders")
    own = config.parse(["--config", str(CONFIG.with_name(f"{stage}.yaml"))], checked=False)
    assert not table.missing(config._kept(own.buckets)) and path.stem.endswith("-encoders") == table.encoders
    assert path.parent.name == folder_name(table.device, table.memory_gib)
    assert all(entry.peak_gib < table.memory_gib and entry.checkpointed <= 28 for entry in table.buckets.values())
