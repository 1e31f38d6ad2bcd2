"""One run of `pytest benchmarks/`: what was measured, what was not there, and the table at its end."""

from collections import defaultdict

import torch

from stdit_fast.benchmarks import clocks, monitor, peers, registry
from stdit_fast.benchmarks.records import Record, append, device_name, installed_versions, processor_name
from stdit_fast.benchmarks.registry import Case

COLUMNS = f"{'case':<58}{'impl':<15}{'ms':>10}{'low':>10}{'high':>10}{'of ours':>9}{'of ceiling':>11}"


class Session:
    """What the tests of one run tell and ask.

    Args:
        device: "cuda" or "cpu".
        records: results file to append each figure to, or None.
    """

    def __init__(self, device: str, records: str | None = None):
        self.device, self.path = device, records
        self.records: list[Record] = []
        self._ours: dict[tuple[str, str], str] = {}
        self._absent: dict[str, list[str]] = defaultdict(list)
        self._left_out: dict[str, list[str]] = {}
        self._not_quick: dict[str, list[str]] = {}
        self._device_clock = clocks.DeviceClock()

    def clock(self, case: Case):
        """What a case is timed with."""
        return clocks.host_clock if case.host or self.device == "cpu" else self._device_clock

    def begin(self) -> None:
        """Before a case: ceilings are known, and clocks stand at their start."""
        clocks.ceiling(self.device)
        self._device_clock.reset()
        self._device_clock.release()

    def left_out(self, suite: str, cases: list[Case], quick: bool) -> None:
        """Notes which cases a quick run leaves out, and which a machine without a GPU does not run."""
        names = {case.name for case in cases}
        if quick:
            own = {f"{case.name} {name}" for case in cases for name in case.implementations}
            every = registry.cases_of(suite, self.device, False)
            full = [f"{case.name} {name}" for case in every for name in case.implementations]
            if missing := [name for name in full if name not in own]:
                self._not_quick[suite] = missing
        if self.device == "cuda":
            return
        missing = [c.name for c in registry.cases_of(suite, "cuda", quick) if c.name not in names]
        if missing:
            self._left_out[suite] = missing

    def absent(self, case: Case, implementation: str, reason: str) -> None:
        """Notes an implementation that cannot be had."""
        self._absent[f"{implementation}: {reason}"].append(f"{case.suite} {case.name}")

    def record(self, case: Case, implementation: str, benchmark, error: float | None, gpu: dict | None) -> None:
        """Keeps a figure, as a record and in pytest-benchmark's extra_info."""
        if benchmark.stats is None:  # --benchmark-disable
            return
        milliseconds = [1e3 * seconds for seconds in benchmark.stats.stats.data]
        notes: dict = {"clock": "host" if case.host or self.device == "cpu" else "device"}
        found, least = clocks.ceiling(self.device), None
        least = found.milliseconds(case)
        record = Record.of_times(
            case.suite, case.name, implementation, milliseconds, bytes=case.bytes, flops=case.flops,
            device=device_name() if self.device == "cuda" else processor_name(), notes=notes,
        )  # fmt: skip
        if self.device == "cuda":
            record.peak_gib = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if least is not None:
            notes["share_of_ceiling"] = round(least / record.ms, 4)
            notes["ceiling"] = {"copy_bytes_per_s": found.copy_bytes_per_s, "gemm_flops_per_s": found.gemm_flops_per_s}
        if error is not None:
            notes["relative_error"] = error
        if gpu is not None:
            notes["gpu"] = gpu
        self.records.append(record)
        self._ours[case.suite, case.name] = case.ours
        ours = self._record_of_ours(record)
        if ours is not None and ours is not record:
            notes["of_ours"] = round(record.ms / ours.ms, 4)
        benchmark.extra_info.update(
            suite=record.suite, case=record.case, impl=record.impl, device=record.device, bytes=record.bytes,
            flops=record.flops, peak_gib=record.peak_gib, versions=record.versions, notes=notes,
        )  # fmt: skip
        if self.path:
            append(self.path, [record])

    def _record_of_ours(self, record: Record) -> Record | None:
        wanted = (record.suite, record.case, self._ours[record.suite, record.case])
        return next((r for r in self.records if (r.suite, r.case, r.impl) == wanted), None)

    def machine(self) -> dict:
        """For pytest-benchmark's machine_info: the GPU, versions, ceilings."""
        found = clocks.ceiling(self.device)
        return {
            "stdit_fast_device": device_name(),
            "stdit_fast_versions": installed_versions(),
            "copy_bytes_per_s": found.copy_bytes_per_s,
            "gemm_flops_per_s": found.gemm_flops_per_s,
        }

    def lines(self) -> list[str]:
        """The table, and what was left out and why."""
        lines = [""]
        if self.records:
            found = clocks.ceiling(self.device)
            lines += [
                f"{device_name()}: a copy reads and writes {found.copy_bytes_per_s / 1e9:.0f} GB/s, a GEMM does "
                f"{found.gemm_flops_per_s / 1e9:.0f} GFLOP/s in {'bfloat16' if self.device == 'cuda' else 'float32'}",
                COLUMNS,
                *map(self._line, self.records),
            ]
        lines += [f"not measured, {text}, in {len(cases)} cases" for text, cases in sorted(self._absent.items())]
        asked = {text.partition(":")[0] for text in self._absent}
        lines += [
            f"not here, {name}: {reason}" for name, reason in peers.absent().items() if name.split(": ")[1] not in asked
        ]
        if self._not_quick:
            counts = ", ".join(f"{len(names)} of {suite}" for suite, names in self._not_quick.items())
            lines.append(f"left out by --quick: {counts}")
        if self._left_out:
            total = sum(map(len, self._left_out.values()))
            lines.append(f"no GPU is visible: {total} cases were left out")
            lines += [f"  {suite}: {', '.join(names)}" for suite, names in self._left_out.items()]
        return lines

    def _line(self, record: Record) -> str:
        ours, share = self._record_of_ours(record), record.notes.get("share_of_ceiling")
        ratio = "" if ours is None or ours is record else f"{record.ms / ours.ms:.2f}x"
        gpu = record.notes.get("gpu")
        return (
            f"{record.suite + ' ' + record.case:<58}{record.impl:<15}{record.ms:>10.3f}{record.ms_low:>10.3f}"
            f"{record.ms_high:>10.3f}{ratio:>9}{'' if share is None else f'{share:.0%}':>11}"
            f"{'' if gpu is None else '  ' + monitor.describe(gpu)}"
        )
