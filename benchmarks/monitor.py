"""What the GPU did while something was measured: clocks, power, temperature, memory, and what held its clocks down.

    with Monitor() as monitor:
        measure()
    monitor.summary()  # {"sm_mhz": [1980, 1755, 1980], ..., "throttled": ["power cap"]}

A thread asks NVML; where there is none, or no GPU, the summary says why and holds nothing else.
"""

import contextlib
import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pynvml
import torch

# What NVML says of clocks below those asked for. That a GPU is idle, or its clocks were set, slows nothing by surprise.
SLOWDOWNS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
SECONDS_BETWEEN = 0.02


@dataclass(frozen=True)
class Sample:
    """One look: clocks in MHz, power in W, temperature in degrees Celsius, memory of all processes in GiB, reasons."""

    sm_mhz: int
    memory_mhz: int
    watts: float
    celsius: int
    memory_gib: float
    reasons: int


class Monitor:
    """Looks at one GPU from entering to leaving, at both ends and every so many seconds between.

    Args:
        device: its number in this process, as PyTorch counts.
        seconds: between two looks.
        nvml: the module that is asked.

    Attributes:
        samples: what was seen.
        absent: why nothing can be seen, "" otherwise.
    """

    def __init__(self, device: int = 0, seconds: float = SECONDS_BETWEEN, nvml=pynvml):
        self.device, self.seconds, self.nvml = device, seconds, nvml
        self.samples: list[Sample] = []
        self.absent = ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._handle = None

    def __enter__(self) -> "Monitor":
        try:
            self.nvml.nvmlInit()
        except self.nvml.NVMLError as error:
            self.absent = f"NVML does not answer: {error}"
            return self
        try:
            self._handle = self._find()
            self.samples.append(self._look())
        except self.nvml.NVMLError as error:
            self.absent = f"NVML does not know this GPU: {error}"
            return self
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._try_to_look()
        if not self.absent.startswith("NVML does not answer"):
            self.nvml.nvmlShutdown()

    def _find(self):
        """NVML's handle; its numbers are not PyTorch's where CUDA_VISIBLE_DEVICES chooses, so the UUID decides."""
        if not torch.cuda.is_available():
            return self.nvml.nvmlDeviceGetHandleByIndex(self.device)
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        return self.nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")

    def _run(self) -> None:
        while not self._done.wait(self.seconds):
            self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            self.samples.append(self._look())
        except self.nvml.NVMLError as error:  # what was seen before stays
            self.absent = f"NVML stopped answering: {error}"
            self._done.set()

    def _look(self) -> Sample:
        nvml, handle = self.nvml, self._handle
        return Sample(
            sm_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            memory_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            watts=nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            celsius=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            memory_gib=nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
            reasons=nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        )

    def summary(self) -> dict:
        """For a record's notes: [median, lowest, highest] of each number, how many looks, what slowed it down.

        "throttled" names what held the clocks down in any look, with the share of the looks: {"power cap": 0.4}.
        """
        if not self.samples:
            return {"absent": self.absent}
        found: dict = {"looks": len(self.samples)}
        for name, digits in (("sm_mhz", 0), ("memory_mhz", 0), ("watts", 0), ("celsius", 0), ("memory_gib", 2)):
            values = [getattr(sample, name) for sample in self.samples]
            found[name] = [round(v, digits) for v in (statistics.median(values), min(values), max(values))]
        found["throttled"] = {
            name: round(share, 3)
            for bit, name in SLOWDOWNS.items()
            if (share := statistics.mean(bool(sample.reasons & bit) for sample in self.samples))
        }
        if self.absent:
            found["absent"] = self.absent
        return found


@contextlib.contextmanager
def watched() -> Iterator[dict]:
    """For a record's notes: {"gpu": summary} of what the body does, filled at its end; nothing without a GPU."""
    notes: dict = {}
    if not torch.cuda.is_available():
        yield notes
        return
    with Monitor() as monitor:
        yield notes
    notes["gpu"] = monitor.summary()


def describe(summary: dict) -> str:
    """A summary as a few words for a table: clocks, power, temperature, and a flag where clocks were held down."""
    if "looks" not in summary:
        return summary.get("absent", "")
    median = {name: summary[name][0] for name in ("sm_mhz", "watts", "celsius")}
    flag = "".join(f", THROTTLED: {name} {share:.0%}" for name, share in summary["throttled"].items())
    return f"{median['sm_mhz']:.0f} MHz {median['watts']:.0f} W {median['celsius']:.0f} C{flag}"
