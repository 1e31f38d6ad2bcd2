"""The list of samples that could not be used, and the share of them beyond which a run stops."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from stdit_fast.errors import ConfigError

# A share means little before this many samples were seen, unless so many of them were bad.
MIN_SEEN = 100
MIN_BAD = 10


class TooManyBadSamples(RuntimeError):
    """More of the samples are unusable than the configuration allows."""


class BadSamples:
    """Lists bad samples in a JSON-lines file, each once, and watches their share.

    Args:
        path: the file; a line is {"sample": row, "path": ..., "reason": ...}. It is read again after a restart.
        max_share: how many of the samples seen may be bad, 0..1.

    Attributes:
        seen, count: samples seen, and how many times one of them was bad (a sample may be met once an epoch).

    Raises:
        ConfigError: `max_share` outside 0..1.
    """

    def __init__(self, path: str | Path, max_share: float):
        if not 0 <= max_share <= 1:
            raise ConfigError("dataset.max_bad_share", max_share, "it must be between 0 and 1.")
        self.path, self.max_share = Path(path), max_share
        self.seen = self.count = 0
        self.listed: set[int] = set()
        self.reasons: Counter[str] = Counter()
        for entry in self._read():
            self._note(entry)

    @property
    def share(self) -> float:
        """Bad ones among the samples seen; one that was replaced counts as seen, too."""
        return self.count / (self.seen + self.count) if self.count else 0.0

    def record(self, found: Iterable[dict], seen: int, *, write: bool = True) -> None:
        """Counts a step's samples and lists the bad ones that are new.

        Args:
            found: bad samples of the step, as in a batch's ``bad``: sample, path, reason.
            seen: good samples of the step.
            write: whether to write to the file; of several processes that count the same, one does.

        Raises:
            TooManyBadSamples: the share is beyond `max_share`, of at least 100 samples or more than 10 bad ones.
        """
        found = list(found)
        self.seen += seen
        self.count += len(found)
        self.add_to_list(found, write=write)
        if (self.seen + self.count >= MIN_SEEN or self.count > MIN_BAD) and self.share > self.max_share:
            raise TooManyBadSamples(self._complaint())

    def add_to_list(self, found: Iterable[dict], *, write: bool = True) -> None:
        """Lists bad samples that are new, without counting them: no step will meet those that no bucket takes."""
        new = []
        for entry in found:
            if entry["sample"] not in self.listed:
                self._note(entry)
                new.append({key: entry[key] for key in ("sample", "path", "reason")})
        if new and write:
            self._append(new)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen, "count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen, self.count = int(state["seen"]), int(state["count"])

    def _note(self, entry: dict) -> None:
        self.listed.add(entry["sample"])
        self.reasons[entry["reason"].partition(":")[0]] += 1

    def _append(self, entries: list[dict]) -> None:
        """Writes whole lines at once; a line that a killed process left unfinished is ended first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        with open(self.path, "a+b", buffering=0) as file:
            if file.seek(0, 2) and not self._ends_a_line(file):
                text = "\n" + text
            file.write(text.encode())

    @staticmethod
    def _ends_a_line(file) -> bool:
        file.seek(-1, 2)
        return file.read(1) == b"\n"

    def _read(self) -> list[dict]:
        if not self.path.is_file():
            return []
        entries = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a line that was not finished
            if (
                isinstance(entry, dict)
                and isinstance(entry.get("sample"), int)
                and isinstance(entry.get("reason"), str)
            ):
                entries.append(entry)
        return entries

    def _complaint(self) -> str:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common(3))
        return (
            f"{self.count} of {self.seen + self.count} samples were unusable, {self.share:.1%}, and "
            f"dataset.max_bad_share allows {self.max_share:.1%}. Reasons: {reasons}; each sample is listed in "
            f"{self.path}. Mend the data, or raise dataset.max_bad_share."
        )
