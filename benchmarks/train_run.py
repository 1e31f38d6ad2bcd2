"""A short real training run of a stage at full model size, on the clips of tests/data.

    python -m stdit_fast.benchmarks.train_run --config train/configs/stage1.yaml --steps 50 --out FOLDER [--real-size]

The autoencoder and T5 are randomly initialised at their real size with `--real-size` (about 12 GB of disk), else the
embedded defaults. With `--features` the samples are encoded first, and the run trains on what was encoded: stills
enough for the batches of the sweep's tables (`-- --buckets auto`), captions of 20 to 200 words, no disk for T5; an H100
with 14 decoding processes encodes 10 samples a second. FOLDER gets metrics.jsonl, which `plan --check` holds against a
table, the configuration, the loss curve and a summary by bucket.
"""

import argparse
import csv
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from stdit_fast.arguments import check_output_folder
from stdit_fast.benchmarks import encode
from stdit_fast.benchmarks.random_encoders import T5_XXL, random_autoencoder, random_t5, t5_config
from stdit_fast.benchmarks.records import command_line, device_name, installed_versions
from stdit_fast.errors import ConfigError, run_command
from stdit_fast.train.demo_data import CAPTIONS
from stdit_fast.train.pictures import loss_curve

# (clip, frames of it that the table offers, height, width, rows): lengths that reach most buckets of stage 1
ROWS = (
    ("bigbuckbunny.mp4", 60, 720, 1280, 240),
    ("bigbuckbunny.mp4", 132, 720, 1280, 80),
    ("bikes.mp4", 60, 272, 640, 120),
    ("bikes.mp4", 250, 272, 640, 60),
    ("bigbuckbunny.mp4", 1, 720, 1280, 300),
    ("bikes.mp4", 1, 272, 640, 100),
)

# (clip, frames, height, width) of a sample of `--features`, and how often of 100
FEATURES = (
    (("bigbuckbunny.mp4", 60, 720, 1280), 7),
    (("bigbuckbunny.mp4", 132, 720, 1280), 4),
    (("bikes.mp4", 60, 272, 640), 9),
    (("bikes.mp4", 250, 272, 640), 5),
    (("bikes.mp4", 300, 272, 640), 3),
    (("bigbuckbunny.mp4", 1, 720, 1280), 54),
    (("bikes.mp4", 1, 272, 640), 18),
)

T5_TOKENS = 32100  # of T5's tokenizer; its model has 32,128


def write_table(clips: Path, path: Path) -> None:
    """A metadata table over the clips; a row of one frame is a still, read as an image."""
    import av

    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "num_frames", "height", "width", "fps"))
        for name, frames, height, width, rows in ROWS:
            source = clips / name
            if frames == 1:
                with av.open(str(source)) as container:
                    still = path.with_name(f"{source.stem}.png")
                    next(container.decode(video=0)).to_image().save(still)
                source = still
            for i in range(rows):
                texts = list(CAPTIONS[name].values())
                writer.writerow((source.resolve(), texts[i % len(texts)], frames, height, width, 25))


def make_real_size_encoders(folder: Path, text: bool = True) -> tuple[Path, Path]:
    """(autoencoder, T5 encoder with a tokenizer), random weights at the sizes of sd-vae-ft and t5-v1_1-xxl.

    Args:
        text: whether T5's weights are written; its config.json and tokenizer always are.
    """
    random_autoencoder().save_pretrained(folder / "vae")
    if text:
        random_t5(**T5_XXL).save_pretrained(folder / "t5")
    else:
        t5_config(**T5_XXL).save_pretrained(folder / "t5")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    write_tokenizer(folder / "t5")
    return folder / "vae", folder / "t5"


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words that knows the clips' captions, of the size that T5's has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for texts in CAPTIONS.values() for text in texts.values() for word in text.split()})
    words = ["<pad>", "</s>", "<unk>", *words]
    words += [f"<unused {i}>" for i in range(T5_TOKENS - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def make_features(scratch: Path, args: argparse.Namespace, vae, t5) -> tuple[Path, Path]:
    """(table, features of its samples, encoded by a process of its own).

    Raises:
        ConfigError: encoding failed.
    """
    rows, often = zip(*FEATURES, strict=True)
    table = encode.write_table(scratch, random.Random(0).choices(rows, often, k=args.samples))
    command = [*encode.START, "--config", args.config, "--dataset.data_path", str(table)]
    command += ["--vae.from_pretrained", str(vae), "--text_encoder.from_pretrained", str(t5)]
    command += ["--dataset.num_workers", str(max(1, (os.cpu_count() or 2) - 2))]
    folder = scratch / "features"
    if subprocess.run([*command, "--features.path", str(folder)]).returncode:
        raise ConfigError("--features", args.samples, "its samples could not be encoded; see above")
    return table, folder


def summarise(metrics: Path) -> dict:
    """Median step time, tokens/s and waiting by bucket, from the second step of each on (the first warms up)."""
    by_bucket = defaultdict(list)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if "loss" in line:
            by_bucket[line["bucket"]].append(line)
    return {
        bucket: {
            "steps": len(steps),
            "median_step_seconds": statistics.median(s["step_seconds"] for s in steps[1:] or steps),
            "median_tokens_per_second": statistics.median(s["tokens_per_second"] for s in steps[1:] or steps),
            "mean_wait_share": statistics.mean(s["wait_share"] for s in steps[1:] or steps),
        }
        for bucket, steps in sorted(by_bucket.items())
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="train/configs/stage1.yaml")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--clips", type=Path, default=Path("tests/data"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the log of the run")
    parser.add_argument("--processes", type=int, default=1, help="GPUs")
    parser.add_argument("--real-size", action="store_true", help="real-size random autoencoder and T5")
    parser.add_argument("--features", action="store_true", help="encode clips of the checkout first, and train on that")
    parser.add_argument("--samples", type=int, default=1600, help="how many, with --features")
    parser.add_argument("overrides", nargs="*", help="further `--key value` of the training, after `--`")
    args = parser.parse_args(arguments)
    if args.samples < 1:
        raise ConfigError("--samples", args.samples, "at least 1")
    check_output_folder("--out", args.out)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        table = scratch / "table.csv"
        vae, t5 = ("patch-codec", "minilm-embeddings")
        if args.real_size:
            vae, t5 = make_real_size_encoders(scratch, text=not args.features)
        overrides = args.overrides
        if args.features:
            table, features = make_features(scratch, args, vae, t5)
            overrides = ["--features.path", str(features), *overrides]
        else:
            write_table(args.clips, table)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(args.processes)]
        command += ["-m", "stdit_fast.train", "--config", args.config, "--steps", str(args.steps)]
        command += ["--dataset.data_path", str(table)]
        command += [] if args.features else ["--dataset.drop_last", "false"]
        command += ["--vae.from_pretrained", str(vae), "--text_encoder.from_pretrained", str(t5)]
        command += ["--outputs", str(scratch / "run"), *overrides]
        done = subprocess.run(command)
        args.out.mkdir(parents=True, exist_ok=True)
        metrics = scratch / "run" / "metrics.jsonl"
        if metrics.is_file() and metrics.stat().st_size:
            shutil.copy(metrics, args.out)
            shutil.copy(args.config, args.out)
            loss_curve(metrics, args.out / "loss.png", title=f"{Path(args.config).stem}, {args.steps} steps")
            summary = {
                "device": device_name(),
                "versions": installed_versions(),
                "encoders": "real size, random weights" if args.real_size else "embedded defaults",
                "command": command_line(),
                "buckets": summarise(metrics),
            }
            (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            print(json.dumps(summary["buckets"], indent=1))
    return done.returncode


if __name__ == "__main__":
    sys.exit(run_command(main))
