"""Encoding a data table into features: how fast, how large, and whether a kill in the middle changes a byte: suite
"encode".

    python -m stdit_fast.benchmarks.encode --out encode.jsonl              # --once: how fast and how large alone

The table's rows are the clips of tests/data and stills of them, captions 20 to 200 words; stage 1's configuration, with
autoencoder and T5-XXL of real size and random weights. The table is encoded once through, which is what is timed, from
the first shard's end to the last one's: by then processes have started, kernels are compiled, and each shard has all
kinds of rows. Then into another folder by a process that is killed (SIGKILL, with its decoding processes) when a third
of the shards is there, and by the same command again. Shards that were finished before the kill must be left alone, and
all must have the bytes of those of the first folder.
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from stdit_fast.benchmarks.records import Record, append, results_file
from stdit_fast.errors import ConfigError, run_command
from stdit_fast.train.demo_data import CAPTIONS
from stdit_fast.train.shards import Shard, clips_name

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT / "tests" / "data"
# (clip, frames that the table offers of it, height, width), in turn; one frame is a still
ROWS = (
    ("bigbuckbunny.mp4", 132, 720, 1280),
    ("bikes.mp4", 250, 272, 640),
    ("bigbuckbunny.mp4", 60, 720, 1280),
    ("bigbuckbunny.mp4", 1, 720, 1280),
)
KILLED_AT = 3  # when one in so many of the shards is there
START = (sys.executable, "-m", "stdit_fast.benchmarks.encode", "--start")


def write_table(folder: Path, rows: Iterable[tuple[str, int, int, int]]) -> Path:
    """A table of such rows as ROWS has."""
    import av

    path, draw = folder / "table.csv", random.Random(0)
    words = sorted({word for texts in CAPTIONS.values() for text in texts.values() for word in text.split()})
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "num_frames", "height", "width", "fps"))
        for name, frames, height, width in rows:
            source = CLIPS / name
            if frames == 1:
                source = folder / f"{Path(name).stem}.png"
                if not source.exists():
                    with av.open(str(CLIPS / name)) as container:
                        next(container.decode(video=0)).to_image().save(source)
            text = " ".join(draw.choices(words, k=draw.randint(19, 199)))
            writer.writerow((source, text, frames, height, width, 25))
    return path


def steady_speed(folder: Path) -> dict[str, float]:
    """Samples and clips a second of all shards but the first, from its end on; for the record's notes.

    Raises:
        ConfigError: there is one shard alone.
    """
    paths = sorted((folder / "shards").glob("part-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    if len(paths) < 2:
        raise ConfigError("samples", len(paths), "they fill one shard, whose beginning is not timed; take more of them")
    seconds = (paths[-1].stat().st_mtime_ns - paths[0].stat().st_mtime_ns) / 1e9
    shards = [Shard(path) for path in paths[1:]]
    samples = sum(len(shard.column("text.samples")) for shard in shards)
    clips = sum(len(shard.column(f"{clips_name(size)}.samples")) for shard in shards for size in shard.sizes)
    found = {"samples_per_second": samples / seconds, "clips_per_second": clips / seconds, "timed_samples": samples}
    return found | {"timed_seconds": seconds, "sizes": len({size for shard in shards for size in shard.sizes})}


def shards_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Name -> digest and time of the last change, of the shards that are there."""
    found = {}
    for path in sorted((folder / "shards").glob("part-*.safetensors")):
        found[path.name] = (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
    return found


def kill_in_the_middle(command: list[str], folder: Path, enough: int) -> dict[str, tuple[str, int]]:
    """Starts a command, kills it and all that it started when `enough` shards are there; answers those that are.

    Raises:
        RuntimeError: it ended before that.
    """
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None and len(list((folder / "shards").glob("part-*.safetensors"))) < enough:
        time.sleep(0.02)
    if process.poll() is not None:
        raise RuntimeError(f"the run that was to be killed ended with {process.returncode} before it could be")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return shards_of(folder)


def compare(whole: dict, killed: dict, resumed: dict) -> dict[str, int]:
    """What became of the shards: counts for the record.

    Args:
        whole, killed, resumed: shards of the run that went through, of the other when it was killed, and at its end.

    Raises:
        RuntimeError: a shard is missing, has other bytes, or was made again although it was finished.
    """
    if not 0 < len(killed) < len(whole):
        raise RuntimeError(f"{len(killed)} of {len(whole)} shards were there at the kill, which is not its middle")
    touched = [name for name, found in killed.items() if resumed.get(name) != found]
    if touched:
        raise RuntimeError(f"finished before the kill, and not left alone: {', '.join(touched)}")
    other = [name for name in whole | resumed if whole.get(name, (0,))[0] != resumed.get(name, (1,))[0]]
    if other:
        raise RuntimeError(f"{len(other)} of {len(whole)} shards differ from an uninterrupted run's: {other}")
    return {"shards": len(whole), "shards_at_the_kill": len(killed), "shards_that_differ": len(other)}


def run(folder: Path, args: argparse.Namespace) -> Record:
    """All three runs, or the first alone, in a scratch folder."""
    vae, text = "patch-codec", "minilm-embeddings"
    if not args.small:
        from stdit_fast.benchmarks.train_run import make_real_size_encoders

        vae, text = make_real_size_encoders(folder, text=False)
    table = write_table(folder, itertools.islice(itertools.cycle(ROWS), args.samples))
    command = [*START, "--config", args.config, "--dataset.data_path", str(table)]
    command += ["--vae.from_pretrained", str(vae), "--text_encoder.from_pretrained", str(text)]
    command += ["--features.shard_mib", str(args.shard_mib), "--dataset.num_workers", str(args.workers)]
    command += [*args.overrides, "--features.path"]
    whole = folder / "whole"
    subprocess.run([*command, str(whole)], check=True)
    speed = steady_speed(whole)
    about = json.loads((whole / "features.json").read_text())
    statistics = about["statistics"] | speed
    per_sample = 1000 / speed["samples_per_second"]
    case = f"{Path(args.config).stem}-{args.samples}"
    record = Record("encode", case, "stdit_fast", per_sample, per_sample, per_sample)
    keys = ("samples", "clips", "tokens", *speed)
    keys += tuple(f"{kind}_per_sample" for kind in ("bytes", "latent_bytes", "text_bytes"))
    record.notes = {key: round(statistics[key], 2) for key in keys}
    record.notes |= {"seconds_with_the_first_shard": round(about["statistics"]["seconds"], 1), "workers": args.workers}
    record.notes |= {key: about["codec"][key] for key in ("latents", "text", "posterior")}
    return record if args.once else record_with_kill(record, command, whole)


def record_with_kill(record: Record, command: list[str], whole: Path) -> Record:
    """The record, with what became of a run that was killed and started again beside `whole`."""
    other, expected = whole.with_name("killed"), shards_of(whole)
    if len(expected) < KILLED_AT:
        remedy = f"that makes {len(expected)} shards, of which none is the middle: at least {KILLED_AT} are needed"
        raise ConfigError("samples", record.notes["samples"], remedy)
    killed = kill_in_the_middle([*command, str(other)], other, max(1, len(expected) // KILLED_AT))
    begun = time.perf_counter()
    subprocess.run([*command, str(other)], check=True)
    record.notes |= compare(expected, killed, shards_of(other))
    record.notes["seconds_of_the_second_start"] = round(time.perf_counter() - begun, 1)
    return record


def start(arguments: list[str]) -> int:
    """The tool itself, where a T5 that is not the embedded one has random weights made on the GPU."""
    from stdit_fast.benchmarks.train_step import random_t5_where_it_runs
    from stdit_fast.train import encode

    with random_t5_where_it_runs():
        return encode.main(arguments)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--start"]:
        return start(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "train" / "configs" / "stage1.yaml"))
    parser.add_argument("--samples", type=int, default=160, help="rows of the table")
    parser.add_argument("--shard-mib", type=float, default=24)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="decoding processes")
    parser.add_argument("--once", action="store_true", help="leave out the run that is killed")
    parser.add_argument("--small", action="store_true", help="the embedded encoders")
    parser.add_argument("--out", type=results_file, help="results file to append to")
    parser.add_argument("overrides", nargs="*", help="further `--key value` of the configuration, after `--`")
    args = parser.parse_args(arguments)
    if args.samples < 1:
        raise ConfigError("samples", args.samples, "at least 1")
    if not (CLIPS / ROWS[0][0]).is_file():
        raise ConfigError("clips", str(CLIPS), "its clips are read; run it in a checkout")
    with tempfile.TemporaryDirectory() as scratch:
        record = run(Path(scratch), args)
    notes = record.notes
    print(
        f"{notes['samples_per_second']:.1f} samples/s, {notes['clips_per_second']:.1f} clips/s of {notes['sizes']} "
        f"sizes, over {notes['timed_seconds']:.1f} s after the first shard; "
        f"{notes['bytes_per_sample'] / 2**20:.2f} MiB a sample"
    )
    if not args.once:
        print(
            f"killed with {notes['shards_at_the_kill']} of {notes['shards']} shards finished, and gone on with: all "
            "have the bytes of an uninterrupted run's"
        )
    if args.out:
        append(args.out, [record])
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
