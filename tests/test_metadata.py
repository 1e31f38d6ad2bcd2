import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stdit_fast.errors import ConfigError
from stdit_fast.train import metadata as module
from stdit_fast.train.metadata import load_metadata

DATA = Path(__file__).parent / "data"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def load(path, **options):
    return load_metadata(path, progress=False, num_workers=2, **options)


@pytest.fixture
def clips(tmp_path):
    """A folder with two real clips, an image and two files that cannot be read."""
    for name in ("carphone_pristine.mp4", "bikes.mp4"):
        shutil.copy(DATA / name, tmp_path)
    Image.new("RGB", (50, 40)).save(tmp_path / "still.png")
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    return tmp_path


@pytest.fixture
def probed(monkeypatch):
    """The paths that were opened, in a list that fills up."""
    opened = []
    real = module.probe

    def counting(path):
        opened.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(module, "probe", counting)
    return opened


def test_csv_with_everything_opens_no_file(tmp_path, probed):
    table = write(
        tmp_path / "t.csv",
        "text,path,fps,num_frames,width,height,aspect_ratio\n"
        '"two\nlines, and a comma",a/b.mp4,23.976,100,640,360,0.56\n'
        "NA,/abs/c.png,0,1,50,40,0.8\n",
    )
    found = load(table)
    assert len(found) == 2 and probed == []
    assert found.row(0)[:6] == (0, str(tmp_path / "a/b.mp4"), "two\nlines, and a comma", 100, 360, 640)
    assert found.row(0).fps == pytest.approx(23.976)
    assert found.row(1) == (1, "/abs/c.png", "NA", 1, 40, 50, 24.0)
    assert [getattr(found, name).dtype for name in ("num_frames", "height", "width", "fps")] == [np.int32] * 3 + [
        np.float32
    ]


def test_parquet_equals_csv(tmp_path):
    columns = {"path": ["a.mp4", "b.mp4"], "text": ["one", None], "num_frames": [5, 6], "height": [7.0, 8.0]}
    columns |= {"width": [9, 10], "fps": [25.0, float("nan")], "extra": [1, 2]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = load(tmp_path / "t.parquet")
    assert found.row(0) == (0, str(tmp_path / "a.mp4"), "one", 5, 7, 9, 25.0)
    assert found.row(1) == (1, str(tmp_path / "b.mp4"), "", 6, 8, 10, 24.0)


def test_dictionary_and_large_strings_are_read(tmp_path):
    paths = pa.array(["a.mp4", "a.mp4"]).dictionary_encode()
    columns = {"path": paths, "text": pa.array(["x", "y"], pa.large_string())}
    table = pa.table(columns | {"num_frames": [1, 1], "height": [2, 2], "width": [3, 3]})
    pq.write_table(table, tmp_path / "t.pq")
    found = load(tmp_path / "t.pq")
    assert found.row(1) == (1, str(tmp_path / "a.mp4"), "y", 1, 2, 3, 24.0)
    assert found.path.type == pa.string() and found.text.type == pa.string()


def test_missing_columns_are_looked_up_in_the_files(clips):
    table = write(clips / "t.csv", "path,text\ncarphone_pristine.mp4,a\nbikes.mp4,b\nstill.png,c\n")
    found = load(table)
    assert [found.row(i)[3:6] for i in range(3)] == [(120, 144, 176), (250, 272, 640), (1, 40, 50)]
    np.testing.assert_allclose(found.fps, [30000 / 1001, 25, 24], rtol=1e-6)
    assert found.unreadable == ()


def test_missing_values_are_looked_up_and_given_ones_kept(clips, probed):
    table = write(
        clips / "t.csv",
        "path,text,num_frames,height,width,fps\n"
        "bikes.mp4,given,10,20,30,\n"
        "bikes.mp4,no height,99,,640,12\n"
        "bikes.mp4,not a number,NaN,272,640,\n"
        "bikes.mp4,zero,250,272,0,\n",
    )
    found = load(table)
    assert [found.row(i)[3:] for i in range(4)] == [
        (10, 20, 30, 24.0),
        (99, 272, 640, 12.0),
        (250, 272, 640, 25.0),
        (250, 272, 640, 25.0),
    ]
    assert probed == ["bikes.mp4"] * 3


def test_unreadable_files_are_reported_and_fit_no_bucket(clips):
    table = write(
        clips / "t.csv",
        "path,text,num_frames\nbikes.mp4,a,250\nbroken.mp4,b,16\ngone.mp4,c,16\n,d,16\nbikes.mp4,e,250\n",
    )
    for _ in range(2):  # the second time from the cache
        found = load(table)
        assert found.num_frames.tolist() == [250, 0, 0, 0, 250]
        assert [(u.row, u.path) for u in found.unreadable] == [(1, "broken.mp4"), (2, "gone.mp4"), (3, "")]
        assert [u.reason.split(":")[0] for u in found.unreadable] == ["corrupt", "vanished", "vanished"]


def test_what_was_looked_up_is_kept_until_a_file_changes(clips, probed):
    table = write(clips / "t.csv", "path,text\nbikes.mp4,a\nstill.png,b\nbroken.mp4,c\n")
    first = load(table)
    assert sorted(probed) == ["bikes.mp4", "broken.mp4", "still.png"]
    probed.clear()
    again = load(table)
    assert probed == []
    for name in ("num_frames", "height", "width", "fps"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))

    Image.new("RGB", (64, 48)).save(clips / "still.png")
    os.utime(clips / "still.png", ns=(1, 1))
    write(table, "path,text\nstill.png,b\ncarphone_pristine.mp4,new\n")
    found = load(table)
    assert sorted(probed) == ["carphone_pristine.mp4", "still.png"]
    assert [found.row(i)[3:6] for i in range(2)] == [(1, 48, 64), (120, 144, 176)]
    probed.clear()
    write(table, "path,text\nbikes.mp4,a\nstill.png,b\ncarphone_pristine.mp4,new\n")
    load(table)
    assert probed == []  # rows that had left the table are still known


def test_cache_folder_is_used_and_keeps_tables_of_one_name_apart(clips, tmp_path, probed):
    cache = tmp_path / "caches" / "here"
    for folder in ("one", "two"):
        (clips / folder).mkdir()
        shutil.copy(clips / "still.png", clips / folder)
        load(write(clips / folder / "t.csv", "path,text\nstill.png,a\n"), cache_dir=cache)
    assert len(probed) == 2 and len(list(cache.iterdir())) == 2
    assert not list((clips / "one").glob("*probed*"))


def test_what_was_found_before_an_interruption_is_kept(clips, probed, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2)
    table = write(clips / "t.csv", "path,text\nbikes.mp4,a\nstill.png,b\ncarphone_pristine.mp4,c\n")
    real = module.probe

    def interrupted(path):
        if "carphone" in str(path):
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "probe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(table)
    probed.clear()
    assert load(table).num_frames.tolist() == [250, 1, 120]
    assert probed == ["carphone_pristine.mp4"]


def test_a_damaged_cache_is_made_anew(clips, probed, caplog):
    table = write(clips / "t.csv", "path,text\nstill.png,b\n")
    cache = clips / "t.csv.probed.parquet"
    for content in (b"PAR1 nonsense", None):
        if content:
            cache.write_bytes(content)
        else:
            pq.write_table(pa.table({"path": ["still.png"]}), cache)
        with caplog.at_level(logging.WARNING):
            assert load(table).height.tolist() == [40]
    assert "cannot be read and is made anew" in caplog.text
    assert len(probed) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(clips, caplog):
    (clips / "file").touch()
    table = write(clips / "t.csv", "path,text\nstill.png,b\n")
    assert load(table, cache_dir=clips / "file").height.tolist() == [40]
    assert "cannot be kept" in caplog.text


def test_no_data_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.csv.*there is no such file.*path and text"):
        load(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_column_names_it_and_those_found(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        write(path, "path,caption\na,b\n")
    else:
        pq.write_table(pa.table({"path": ["a"], "caption": ["b"]}), path)
    with pytest.raises(ConfigError, match="column 'text' must be there; found: path, caption"):
        load(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", "path,text\n", "no rows"),
        ("t.csv", "", "Empty CSV"),
        ("t.csv", "path,text,height\na,b,tall\n", "tall"),
        ("t.csv", "path,text\na\n", "cannot be read"),
        ("t.parquet", "PAR1", "cannot be read"),
        ("t.json", "{}", r"one of \.csv, \.parquet, \.pq"),
    ],
)
def test_unusable_tables(tmp_path, name, content, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / name, content))
