"""Writes the benchmark tables of README and docs from the result files: `python -m stdit_fast.benchmarks.readme`."""

import argparse
import json
import statistics
import sys
from pathlib import Path

from stdit_fast.errors import ConfigError, run_command

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md", ROOT / "docs" / "multi_gpu.md")
IMPLEMENTATIONS = ("reference", "compile", "fused")
BEGIN, END = "<!-- {name}: made by python -m stdit_fast.benchmarks.readme -->", "<!-- end of {name} -->"


def latest(path: Path) -> dict[tuple[str, str, str], dict]:
    """The records of a results file by (suite, case, impl); a later line replaces an earlier one."""
    records = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        records[record["suite"], record["case"], record["impl"]] = record
    return records


def headline_table(results: Path, recipe: Path) -> str:
    """Markdown: the most telling figures of one GPU, each beside its peer.

    Args:
        results: a GPU's folder of records.
        recipe: the original's recipe, which has the times of its own steps.
    """
    import yaml

    records = {}
    for suite in ("step", "attention", "encoders", "optimizer", "train_step"):
        records |= latest(results / f"{suite}.jsonl")
    content = yaml.safe_load(recipe.read_text())
    original = {case: ms for stage in content["original"].values() for case, ms in stage.items()}
    whole = sum(content["original_parts"]["240p-16-17"].values())

    def attention(case: str, impl: str) -> float:
        return sum(records["attention", f"{case}-{way}", impl]["ms"] for way in ("forward", "backward"))

    rows = [
        (f"step of the transformer, {what}", records["step", case, "fused"]["ms"], "Open-Sora 1.1", original[case])
        for case, what in (
            ("144p-16-6", "6 clips of 16 frames, 144p"),
            ("240p-16-17", "17 clips of 16 frames, 240p"),
            ("720p-16-2", "2 clips of 16 frames, 720p"),
        )
    ]
    encoding = "encoding in the step"
    peer = f"Open-Sora 1.1, {encoding}"
    rows += [
        (f"whole training step of those 17 clips, {what}", records["train_step", case, "stdit_fast"]["ms"], peer, whole)
        for case, what in (("240p-16-17-online", encoding), ("240p-16-17-features", "on features made before"))
    ]
    rows += [
        (f"attention within frames of {case.split('x')[1]} tokens, QK-norm inside", attention(case, "cuda"), peer, its)
        for case in ("96x144", "64x1024", "16x3600")
        for peer, its in [("cuDNN, without the norm", attention(case, "cudnn"))]
    ]
    rows += [
        (what, records[suite, case, ours]["ms"], peer, records[suite, case, its]["ms"])
        for what, suite, case, ours, peer, its in (
            ("autoencoder, 272 frames of 240x424", "encoders", "vae-272x240x424", "fused", "diffusers", "diffusers"),
            ("T5-XXL, 17 captions", "encoders", "t5-17-uneven", "fused", "transformers", "transformers"),
            ("optimizer and average", "optimizer", "gap-767M", "fused", "ColossalAI's ZeRO-2", "colossalai"),
        )
    ]
    lines = ["| one H100 | ms | beside | ms | times faster |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {what} | {_ms(own)} | {peer} | {_ms(its)} | {its / own:.1f} |" for what, own, peer, its in rows]
    return "\n".join([*lines, "", _machine(list(records.values()))])


def _ms(milliseconds: float) -> str:
    """Three digits, or whole milliseconds."""
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:#.3g}"


def step_table(path: Path) -> str:
    """Markdown: a row for each case of the step suite and each implementation."""
    rows = ["| case | implementation | ms (low to high) | TFLOP/s | peak GiB |", "| --- | --- | --- | --- | --- |"]
    records = list(latest(path).values())
    cases = list(dict.fromkeys(r["case"] for r in records))
    for r in sorted(records, key=lambda r: (cases.index(r["case"]), IMPLEMENTATIONS.index(r["impl"]))):
        rows.append(f"| {r['case']}{_checkpointing(r['notes'])} | {r['impl']} | {_figures(r)} |")
    return _page(rows, records, "`python -m stdit_fast.benchmarks.step`")


def _checkpointing(notes: dict) -> str:
    kind = notes.get("checkpointing", "off")
    if kind == "off":
        return ""
    return f", {notes['checkpointed_blocks']} blocks recomputed" if kind == "auto" else ", all blocks recomputed"


def sample_table(path: Path) -> str:
    """Markdown: a row for each case of the sample suite, what was timed, and each implementation."""
    rows = [
        "| case | what | implementation | ms (low to high) | TFLOP/s | peak GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    records = list(latest(path).values())
    for r in records:
        implementation = r["impl"].removesuffix(r["notes"]["what"]).strip()
        rows.append(f"| {r['case']} | {_what(r['notes'])} | {implementation} | {_figures(r)} |")
    return _page(rows, records, "`python -m stdit_fast.benchmarks.sample`")


def _what(notes: dict) -> str:
    """What a record of the sample suite timed, in words."""
    names = {"samples": f"a sample, {notes.get('steps')} steps", "forward": "one prediction"}
    return names.get(notes["what"], notes["what"])


def ops_table(path: Path) -> str:
    """Markdown: a row for each op and direction, ours beside plain PyTorch."""
    rows = [
        "| op, samples x frames x positions | plain ms | compiled ms | fused ms | of copy bandwidth |",
        "| --- | --- | --- | --- | --- |",
    ]
    records = latest(path)
    for (suite, case, impl), fused in records.items():
        if impl == "fused":
            plain, compiled = (records[suite, case, peer]["ms"] for peer in ("reference", "compile"))
            share = fused["notes"]["share_of_copy"]
            rows.append(f"| {case} | {plain:.3f} | {compiled:.3f} | {fused['ms']:.3f} | {share:.0%} |")
    copy = next(iter(records.values()))["notes"]["copy_bytes_per_s"]
    bandwidth = f"a device copy reads and writes {copy / 1e12:.2f} TB/s."
    return "\n".join(
        [
            *rows,
            "",
            f"{_machine(list(records.values()))[:-1]}; {bandwidth}",
            "",
            "`python -m stdit_fast.benchmarks.ops`",
        ]
    )


def attention_table(path: Path, cases: str = "sequences x length, 16 heads of 72", arguments: str = "") -> str:
    """Markdown: a row for each case and direction of the attention suite, ours beside the libraries.

    Args:
        cases: what a case's name is made of.
        arguments: of the benchmark's command.
    """
    rows = [
        f"| {cases} | ours, QK-norm inside | cuDNN, no norm | FlashAttention 2, no norm |",
        "| --- | --- | --- | --- |",
    ]
    records = latest(path)
    for suite, case, impl in records:
        if impl == "cuda":
            found = [records[suite, case, name] for name in ("cuda", "cudnn", "flash_attention_2")]
            cells = [f"{r['ms']:.3f} ms, {r['flops'] / r['ms'] / 1e9:.0f} TFLOP/s" for r in found]
            rows.append(f"| {case} | {' | '.join(cells)} |")
    command = f"`python -m stdit_fast.benchmarks.attention{arguments}`"
    return _page(rows, list(records.values()), command)


def optimizer_table(path: Path) -> str:
    """Markdown: a row for each case of the optimizer suite, ours beside the peers."""
    names = {"adamw": "on the GPU", "gap": "from gradients to the next forward pass, on the wall"}
    rows = ["| what | averages | implementation | ms (low to high) | of copy bandwidth |", "| --- " * 5 + "|"]
    records = list(latest(path).values())
    for r in records:
        kind, _, rest = r["case"].partition("-")
        share = r["notes"].get("share_of_copy")
        spread = f"{r['ms']:.1f} ({r['ms_low']:.1f} to {r['ms_high']:.1f})"
        averages = "no" if rest.endswith("-no-ema") else "yes"
        cells = f"{averages} | {r['impl']} | {spread} | {'-' if share is None else f'{share:.0%}'}"
        rows.append(f"| {names[kind]} | {cells} |")
    return _page(rows, records, "`python -m stdit_fast.benchmarks.optimizer`")


def train_step_table(path: Path, options: str = "") -> str:
    """Markdown: a row for each case of the train_step suite, split into the parts of a step.

    Args:
        options: of the command that made them.
    """
    parts = ("data", "autoencoder", "text encoder")
    rows = [
        "| case | step, ms (low to high) | waiting for data | autoencoder | text encoder | transformer "
        "| optimizer, average | transformer's share | peak GiB |",
        "| --- " * 9 + "|",
    ]
    records = list(latest(path).values())
    for r in records:
        own = r["notes"]["parts"]
        times = [*(own[part] for part in parts), own["forward"] + own["backward"], own["optimizer"]]
        blocks, passes = r["notes"]["checkpointed_blocks"], r["notes"].get("pieces", 1)
        case = f"{r['case']}, in {passes} passes" if passes > 1 else r["case"]
        case += f", {blocks} of the blocks recomputed" if blocks else ""
        cells = [f"{r['ms']:.0f} ({r['ms_low']:.0f} to {r['ms_high']:.0f})", *(f"{ms:.1f}" for ms in times)]
        cells += [f"{r['notes']['transformer_share']:.1%}", f"{r['peak_gib']:.1f}"]
        rows.append(f"| {case} | {' | '.join(cells)} |")
    return _page(rows, records, f"`python -m stdit_fast.benchmarks.train_step{options}`")


def loading_table(path: Path) -> str:
    """Markdown: clips that one core decodes, and that a loader delivers."""
    rows = ["| what | ms a clip | clips a second | processes | clips a second of each |", "| --- " * 5 + "|"]
    records = list(latest(path).values())
    for r in records:
        rate, cores = r["notes"]["clips_per_second"], r["notes"]["cores"]
        rows.append(f"| {r['case']} | {r['ms']:.1f} | {rate:.1f} | {cores} | {rate / max(1, cores):.1f} |")
    machine = f"{_machine(records)[:-1]}; {records[0]['notes']['machine_cores']} cores."
    return "\n".join([*rows, "", machine, "", "`python -m stdit_fast.benchmarks.data`"])


def encode_table(path: Path) -> str:
    """Markdown: how fast a data table was encoded into features, and what they take on the disk."""
    rows = [
        "| stage's sizes, samples | samples a second | clips a second | decoding processes | KiB a sample "
        "| of latents | clips | of text | tokens |",
        "| --- " * 9 + "|",
    ]
    records = list(latest(path).values())
    for r in records:
        own = r["notes"]
        stage, _, samples = r["case"].partition("-")
        rates = [f"{own[f'{what}_per_second']:.1f}" for what in ("samples", "clips")]
        kib = [own[f"{kind}_per_sample"] / 1024 for kind in ("bytes", "latent_bytes", "text_bytes")]
        clips, tokens = (own[what] / own["samples"] for what in ("clips", "tokens"))
        cells = [f"{stage}, {samples}", *rates, str(own["workers"]), f"{kib[0]:,.0f}", f"{kib[1]:,.0f}", f"{clips:.2f}"]
        rows.append(f"| {' | '.join(cells)} | {kib[2]:,.0f} | {tokens:.0f} |")
    return _page(rows, records, "`python -m stdit_fast.benchmarks.encode --once`")


def encoders_table(path: Path) -> str:
    """Markdown: a row for each case of the encoders suite and each implementation."""
    rows = [
        "| case | implementation | ms (low to high) | TFLOP/s | peak GiB beside weights | error to float32 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    records = list(latest(path).values())
    for r in records:
        rows.append(f"| {r['case']} | {r['impl']} | {_figures(r)} | {r['notes']['relative_error']:.1%} |")
    return _page(rows, records, "`python -m stdit_fast.benchmarks.encoders`")


def quick_table(path: Path) -> str:
    """Markdown: a row for each case of `pytest benchmarks/ --quick` on a GPU: ours, and its peers in multiples."""
    rows = ["| case | ours, ms | peers, in multiples of ours | of the ceiling |", "| --- | --- | --- | --- |"]
    by_case: dict[str, list[dict]] = {}
    for r in latest(path).values():
        by_case.setdefault(f"{r['suite']} {r['case']}", []).append(r)
    for case, records in by_case.items():
        ours, *peers = sorted(records, key=lambda r: r["impl"] not in ("fused", "stdit_fast"))
        held = ", ".join(ours["notes"].get("gpu", {}).get("throttled", {}))
        ratios = ", ".join(f"{r['impl']} {r['ms'] / ours['ms']:.2f}" for r in peers)
        share = ours["notes"].get("share_of_ceiling")
        cells = f"{ours['ms']:.3f}{f' ({held})' * bool(held)} | {ratios or '-'}"
        rows.append(f"| {case} | {cells} | {'-' if share is None else f'{share:.0%}'} |")
    records = list(latest(path).values())
    ceiling = next(r["notes"]["ceiling"] for r in records if "ceiling" in r["notes"])
    machine = (
        f"{_machine(records)[:-1]}; a copy reads and writes {ceiling['copy_bytes_per_s'] / 1e12:.2f} TB/s, a GEMM "
    )
    machine += f"does {ceiling['gemm_flops_per_s'] / 1e12:.0f} TFLOP/s. In brackets: what held the clocks down."
    return "\n".join([*rows, "", machine, "", "`pytest benchmarks/ --quick --records quick.jsonl`"])


def sweep_table(folder: Path) -> str:
    """Markdown: a row for each table of batch sizes of a GPU."""
    from stdit_fast.train.bucket_tables import read

    rows = [
        "| table | buckets, measured | in pieces | s a step | slowest over fastest, less 1 | at best | the config's | "
        "waiting | the config's | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    tables = [read(path) for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)]
    for table in tables:
        seconds = [entry.seconds for entry in table.buckets.values()]
        even, peak = table.evenness, max(entry.peak_gib for entry in table.buckets.values())
        measured = sum(entry.measured for entry in table.buckets.values())
        pieces = sum(entry.pieces > 1 for entry in table.buckets.values())
        rows.append(
            f"| {table.path.stem} | {len(seconds)}, {measured} | {pieces} | {min(seconds):.2f} to {max(seconds):.2f} | "
            f"{even['spread']:.0%} | {even['best_spread']:.0%} | {even['original_spread']:.0%} | "
            f"{even['waiting']:.0%} | {even['original_waiting']:.0%} | {peak:.0f} |"
        )
    records = [{"device": t.device, "versions": t.versions, "date": t.date} for t in tables]
    return _page(rows, records, "`python -m stdit_fast.benchmarks.sweep --config CONFIG...`")


def scaling_table(path: Path) -> str:
    """Markdown: a row for what several GPUs do together, beside what each does alone."""
    rows = ["| what | GPUs | ms (low to high) | tokens/s a GPU | of as many alone |", "| --- " * 5 + "|"]
    records = list(latest(path).values())
    for r in records:
        alone = r["impl"] == "1 GPU" or r["impl"].startswith("rank ")
        if alone or "communication_share" in r["notes"]:  # a trace's
            continue
        rate, together = r["notes"].get("tokens_per_second_and_gpu"), _of_alone(r, records)
        spread = f"{r['ms']:.1f} ({r['ms_low']:.1f} to {r['ms_high']:.1f})"
        cells = f"{'-' if rate is None else f'{rate:,}'} | {'-' if together is None else f'{together:.1%}'}"
        rows.append(f"| {r['case']} | {r['impl']} | {spread} | {cells} |")
    return _page(rows, records, "`python -m stdit_fast.benchmarks.scaling mix long sample`")


def _of_alone(r: dict, records: list[dict]) -> float | None:
    """How much of what its GPUs do alone a record's do together; None: it is of a part of a step."""
    gpus = int(r["impl"].split()[0])
    if "depth" not in r["notes"]:
        return None
    if r["case"].startswith("mix"):
        alone = [o for o in records if o["case"] == r["case"] and o["impl"].endswith(f" of {gpus} alone")]
        return r["notes"]["tokens_per_second_and_gpu"] / statistics.mean(
            o["notes"]["tokens_per_second_and_gpu"] for o in alone
        )
    ones = [o for o in records if o["impl"] == "1 GPU"]
    if "tokens_per_gpu" in r["notes"]:  # longer for more GPUs
        alike = [o for o in records if o["notes"].get("tokens_per_gpu") == r["notes"]["tokens_per_gpu"]]
        each = [o for o in alike if o["impl"].endswith(f" of {gpus} alone")] or [o for o in alike if o in ones]
        return r["notes"]["tokens_per_second_and_gpu"] / statistics.mean(
            o["notes"]["tokens_per_second_and_gpu"] for o in each
        )
    (one,) = (o for o in ones if o["case"] == r["case"])
    return one["ms"] / r["ms"] / gpus


def sweep_check_table(path: Path) -> str:
    """Markdown: what the trainer's steps took at the sizes of tables, and at those of configurations."""
    rows = [
        "| batch sizes of | buckets, steps | s a step | slowest over fastest, less 1 | waiting | "
        "beside the table's times | GiB | out of memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    records = list(latest(path).values())
    names = dict.fromkeys(r["case"].rpartition(" ")[0] for r in records)
    for name in names:
        own = [r for r in records if r["case"].rpartition(" ")[0] == name]
        seconds = [r["ms"] / 1e3 for r in own]
        slow, mean = max(seconds), sum(seconds) / len(seconds)
        planned = [r["notes"]["table_seconds"] for r in own]
        off = "-" if None in planned else f"{sum(seconds) / sum(planned) - 1:+.1%}"
        peak = max(r["peak_gib"] or 0 for r in own)
        rows.append(
            f"| {name} | {len(own)}, {own[0]['notes']['steps_of_all']} | {min(seconds):.2f} to {slow:.2f} | "
            f"{slow / min(seconds) - 1:.0%} | {slow / mean - 1:.0%} | {off} | {peak:.0f} | "
            f"{own[0]['notes']['out_of_memory_of_all']} times |"
        )
    command = "`python -m stdit_fast.benchmarks.sweep_check --config CONFIG... --table TABLE...`"
    return _page(rows, records, command)


def plan_table() -> str:
    """Markdown: the original's recipe on 64 GPUs, phase by phase."""
    from stdit_fast.benchmarks import plan  # which reads results as this file does

    return plan.markdown(64)


def plan_sizes_table() -> str:
    """Markdown: the original's recipe on one machine, on eight, and on 64 of them."""
    from stdit_fast.benchmarks import plan

    return plan.sizes_markdown([8, 64, 512])


def _figures(r: dict) -> str:
    """Time with its spread, rate and memory, as cells."""
    peak = "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}"
    spread = f"{r['ms']:.0f} ({r['ms_low']:.0f} to {r['ms_high']:.0f})"
    return f"{spread} | {r['flops'] / r['ms'] / 1e9:.0f} | {peak}"


def _page(rows: list[str], records: list[dict], command: str) -> str:
    """A table, where and when its records were measured, and what makes them anew."""
    return "\n".join([*rows, "", _machine(records), "", command])


def _machine(records: list[dict]) -> str:
    """Where and when the records were measured."""
    devices, versions, dates = (
        sorted({value(r) for r in records})
        for value in (lambda r: r["device"], lambda r: r["versions"]["torch"], lambda r: r["date"])
    )
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{' and '.join(devices)}, PyTorch {' and '.join(versions)}, {when}."


def tables() -> dict[str, str]:
    """Every generated part of the pages by its name."""
    results, h100 = (ROOT / "benchmarks" / "results" / gpu for gpu in ("h200", "h100"))
    return {
        "headline h100": headline_table(h100, ROOT / "train" / "configs" / "recipe_v1_1.yaml"),
        "step h100": step_table(h100 / "step.jsonl"),
        "step h200": step_table(results / "step.jsonl"),
        "sample h100": sample_table(h100 / "sample.jsonl"),
        "ops h200": ops_table(results / "ops.jsonl"),
        "attention h100": attention_table(h100 / "attention.jsonl"),
        "head_dims h100": attention_table(
            h100 / "attention_head_dims.jsonl",
            "sequences x length x head dimension (72 where none is said), 16 heads",
            " --cases 96x144 64x1024 16x3600 --head-dim 64 72 80 96",
        ),
        "optimizer h100": optimizer_table(h100 / "optimizer.jsonl"),
        "encoders h100": encoders_table(h100 / "encoders.jsonl"),
        "encode h100": encode_table(h100 / "encode.jsonl"),
        "train_step h100": train_step_table(h100 / "train_step.jsonl"),
        "train_step_whole h100": train_step_table(h100 / "train_step_whole.jsonl", " -- --split_batches false"),
        "train_step h200": train_step_table(results / "train_step.jsonl"),
        "train_step_mixed h100": train_step_table(h100 / "train_step_mixed.jsonl", " --mixed"),
        "loading h100": loading_table(h100 / "loading.jsonl"),
        "sweep h100": sweep_table(ROOT / "train" / "configs" / "buckets" / "h100-80gb"),
        "sweep_check h100": sweep_check_table(h100 / "sweep_check.jsonl"),
        "scaling h200": scaling_table(results / "scaling.jsonl"),
        "quick h100": quick_table(h100 / "quick.jsonl"),
        "plan h100": plan_table(),
        "plan_sizes h100": plan_sizes_table(),
    }


def filled() -> dict[Path, str]:
    """The pages with their generated parts made anew. Each part stands on one of them."""
    pages = {path: path.read_text() for path in PAGES}
    for name, table in tables().items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        places = [path for path, text in pages.items() if begin in text and end in text]
        if len(places) != 1:
            names = " or ".join(str(path.relative_to(ROOT)) for path in PAGES)
            raise SystemExit(f"{begin} ... {end} should stand once, in {names}")
        before, _, rest = pages[places[0]].partition(begin)
        pages[places[0]] = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return pages


def main() -> int:
    argparse.ArgumentParser(description=__doc__.partition(":")[0]).parse_args()
    if not PAGES[0].is_file():
        raise ConfigError("README.md", str(PAGES[0]), "it is not there; run this in a checkout, installed with -e")
    for path, text in filled().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
