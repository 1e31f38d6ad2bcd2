"""What a sweep found, as one HTML page that needs nothing beside it: pictures inside, tables, and how to read them."""

import base64
import html
import io
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from stdit_fast.benchmarks.step import step_flops
from stdit_fast.benchmarks.sweep import Stage, Sweep
from stdit_fast.benchmarks.sweep_model import GIB, Choice
from stdit_fast.media.files import whole_file

# Dense bf16 of the tensor cores, in FLOP/s, as NVIDIA states it: of H100 SXM, H800 SXM and H200 alike.
PEAKS = {"H100": 989e12, "H800": 989e12, "H200": 989e12}
_OURS, _BEFORE = "#1f6f8b", "#c9a227"


@dataclass(frozen=True)
class Row:
    """One bucket: its choice, and the config's own batch size with what is expected of that."""

    choice: Choice
    flops: int
    before: Choice
    before_fits: bool


def rows_of(sweep: Sweep, stage: Stage, model_config) -> list[Row]:
    """The buckets of a stage, with the batch sizes that its config states beside those that were chosen."""
    tokens = sweep.conditions.text_tokens
    rows = []
    for choice, (before, fits) in zip(stage.choices.values(), sweep.originals(stage), strict=True):
        shape = choice.shape
        flops = step_flops(model_config, choice.batch, shape.frames, shape.positions, tokens)
        rows.append(Row(choice, flops, before, fits))
    return rows


def write_report(path: Path, sweep: Sweep, model_config) -> None:
    """Writes the page; a section for each stage."""
    of = sweep.conditions
    errors = sweep.model.time_errors
    parts = [
        f"<h1>Batch sizes for {html.escape(of.device)}</h1>",
        f"<p>{of.memory_gib:.1f} GiB, of which a step may take {sweep.budget / GIB:.1f}; optimizer and average over "
        f"{of.world_size} rank{'s' * (of.world_size > 1)}; "
        f"{'autoencoder and text encoder run in each step' if sweep.encoding else 'latents and text states are read'}; "
        f"{of.text_tokens} text tokens a caption; the aspect ratio with the most tokens. {date.today().isoformat()}. "
        f"Made from {len(sweep.model.probes)} probes, {sum(not p.ran for p in sweep.model.probes)} of which ran out of "
        f"memory; before a bucket's own probes the formula for times was wrong by "
        f"{100 * _median([abs(e) for e in errors]):.1f}% (median), {100 * max(map(abs, errors)):.0f}% at most.</p>",
    ]
    for stage in sweep.stages:
        parts += _section(sweep, stage, model_config)
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(of.device)}</title>{_STYLE}"
    with whole_file(path) as draft:
        draft.write_text(page + "\n".join(parts) + "</html>\n")


def _section(sweep: Sweep, stage: Stage, model_config) -> list[str]:
    rows = rows_of(sweep, stage, model_config)
    even = sweep.evenness(stage)
    share = even["of_best_rates"]
    lines = [
        ("slowest bucket over fastest, less 1", even["original_spread"], even["spread"], even["best_spread"]),
        ("slowest over mean, less 1", even["original_waiting"], even["waiting"], None),
    ]
    table = "".join(
        f"<tr><td>{name}<td>{a:.0%}<td>{b:.1%}<td>{'' if c is None else f'{c:.1%}'}" for name, a, b, c in lines
    )
    return [
        f"<h2>{html.escape(stage.name)}: {stage.seconds:.2f} s a step</h2>",
        f"<table><tr><th>imbalance<th>the config's batch sizes<th>these<th>best of whole batch sizes{table}</table>",
        f"<p>If every step took as long as the slowest bucket's, buckets would get {share:.0%} of their best rates on "
        f"average: the rest is recomputation, floors and rounding to whole batches.</p>",
        _picture(_step_times(rows), "Step time of each bucket, with the config's batch sizes and with these."),
        _picture(_imbalance(rows), "Step time over the mean of the stage's buckets: 1 is even."),
        _picture(_rates(rows), "Tokens a second."),
        _picture(
            _shares(rows, sweep.conditions.device), "FLOP/s beside the tensor cores' peak; recomputing not counted."
        ),
        _picture(_memory(rows, sweep.budget), "Memory at the peak of a step, and what it may take."),
        _bucket_table(rows),
    ]


def _bucket_table(rows: list[Row]) -> str:
    head = "bucket|size|batch|pieces|recomputed blocks|s|tokens|tokens/s|TFLOP/s|peak GiB|config's batch|its s"
    lines = []
    for r in rows:
        c, b = r.choice, r.before
        tokens = c.shape.tokens(c.batch)
        its = f"{b.seconds:.2f}" + ("" if b.measured else "*") if r.before_fits else "does not fit"
        mark = "" if c.measured else "*"
        cells = (
            c.shape.name, f"{c.shape.height}x{c.shape.width}", c.batch, c.pieces, c.checkpointed,
            f"{c.seconds:.3f}{mark}",
            f"{tokens:,}", f"{tokens / c.seconds:,.0f}", f"{r.flops / c.seconds / 1e12:.0f}", f"{c.peak / GIB:.1f}",
            b.batch, its,
        )  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in cells))
    heads = "".join(f"<th>{h}" for h in head.split("|"))
    return f"<table><tr>{heads}{''.join(lines)}</table><p>* expected from the fit; all others are measured.</p>"


# ------------------------------------------------------------------ pictures


def _axes(rows: list[Row], label: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xticks(range(len(rows)), [r.choice.shape.name for r in rows], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _before_and_after(rows: list[Row], label: str, before: list[float], after: list[float]):
    figure, axes = _axes(rows, label)
    places = range(len(rows))
    axes.bar([i - 0.2 for i in places], before, 0.4, color=_BEFORE, label="config's sizes")
    axes.bar([i + 0.2 for i in places], after, 0.4, color=_OURS, label="these sizes")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
    return figure, axes


def _step_times(rows: list[Row]):
    before, after = ([c.seconds for c in choices] for choices in _choices(rows))
    return _before_and_after(rows, "seconds a step", before, after)[0]


def _imbalance(rows: list[Row]):
    columns = []
    for choices in _choices(rows):
        mean = sum(c.seconds for c in choices) / len(choices)
        columns.append([c.seconds / mean for c in choices])
    figure, axes = _before_and_after(rows, "step time over the mean", *columns)
    axes.axhline(1, color="black", linewidth=0.8)
    return figure


def _choices(rows: list[Row]) -> tuple[list[Choice], list[Choice]]:
    """(the config's, those that were chosen)"""
    return [r.before for r in rows], [r.choice for r in rows]


def _rates(rows: list[Row]):
    figure, axes = _axes(rows, "tokens/s")
    axes.bar(range(len(rows)), [r.choice.shape.tokens(r.choice.batch) / r.choice.seconds for r in rows], color=_OURS)
    return figure


def _shares(rows: list[Row], device: str):
    peak = next((value for name, value in PEAKS.items() if name in device), None)
    figure, axes = _axes(rows, "TFLOP/s" if peak is None else f"share of {peak / 1e12:.0f} TFLOP/s, %")
    unit = 1e12 if peak is None else peak / 100
    axes.bar(range(len(rows)), [r.flops / r.choice.seconds / unit for r in rows], color=_OURS)
    return figure


def _memory(rows: list[Row], budget: float):
    figure, axes = _axes(rows, "GiB")
    axes.bar(range(len(rows)), [r.choice.peak / GIB for r in rows], color=_OURS)
    axes.axhline(budget / GIB, color="firebrick", linewidth=1)
    return figure


def _picture(figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


_STYLE = """<style>
body {font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222}
table {border-collapse: collapse; margin: 1em 0}
td, th {padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd}
td:first-child, th:first-child {text-align: left}
figure {margin: 1.5em 0} img {max-width: 100%} figcaption {color: #666}
</style>"""
