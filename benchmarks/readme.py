"""Writes the README's benchmark tables from the result files: `python -m stdit_fast.benchmarks.readme`."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- {name}: made by python -m stdit_fast.benchmarks.readme -->", "<!-- end of {name} -->"


def latest(path: Path) -> dict[tuple[str, str, str], dict]:
    """The records of a results file by (suite, case, impl); a later line replaces an earlier one."""
    records = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        records[record["suite"], record["case"], record["impl"]] = record
    return records


def step_table(path: Path) -> str:
    """Markdown: a row for each case of the step suite and each implementation."""
    rows = ["| case | implementation | ms (low to high) | TFLOP/s | peak GiB |", "| --- | --- | --- | --- | --- |"]
    for (_, case, impl), r in latest(path).items():
        rate = r["flops"] / r["ms"] / 1e9
        label = case if r["notes"].get("checkpointing", "off") == "off" else f"{case}, checkpointing"
        spread = f"{r['ms']:.0f} ({r['ms_low']:.0f} to {r['ms_high']:.0f})"
        rows.append(f"| {label} | {impl} | {spread} | {rate:.0f} | {r['peak_gib']:.1f} |")
    machine = f"{r['device']}, PyTorch {r['versions']['torch']}, {r['date']}."
    return "\n".join([*rows, "", machine, "", f"`{r['command'].split(' --cases')[0]}`"])


def tables() -> dict[str, str]:
    """Every generated part of the README by its name."""
    return {"step h200": step_table(ROOT / "benchmarks" / "results" / "h200" / "step.jsonl")}


def filled(text: str) -> str:
    """The README with its generated parts made anew."""
    for name, table in tables().items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"README.md has no part {begin} ... {end}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
