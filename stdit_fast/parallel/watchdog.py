"""Notices that a rank has died, failed or hangs, says which one, and ends the others, which would wait for it for long.

Every rank writes a line about itself into the launcher's key-value store every few seconds: that it lives, and where it
is (step, phase, bucket). Rank 0 reads all of them, the others read rank 0's and its verdict; so the store answers some
requests a rank, not the square of them. A thread does this beside the training, which may be stuck in a collective.

- Lost: the process is gone (seen at once on the same machine), or was silent for `dead_after` seconds in a step.
- Failed: it left an error before it went.
- Late: no rank gets on for `hang_timeout` seconds; the one that is least far is named, and the one that is furthest.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from stdit_fast.parallel.processes import Processes, machine_id

logger = logging.getLogger(__name__)

EXIT_STATUS = 75  # "try again": the launcher may start the run anew from its last checkpoint
LOADING, COMPUTING, UPDATING, BESIDE = "loading a batch", "forward and backward", "the optimizer's step", "beside steps"
# Seconds of silence that are allowed beside steps: libraries that write gigabytes let no other thread run meanwhile.
SILENCE_BESIDE = 300.0
_ORDER = (LOADING, COMPUTING, UPDATING)


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        step, phase, bucket: of the training; the phase is one of this module's names.
        count: how many places it has been at, so that standing still shows.
        beats: how many times it wrote this line, so that silence shows.
        error: why it is leaving.
        done: whether it has left as it should.
    """

    rank: int
    host: str
    machine: str
    pid: int
    step: int = 0
    phase: str = BESIDE
    bucket: str = ""
    count: int = 0
    beats: int = 0
    error: str = ""
    done: bool = False

    def __str__(self) -> str:
        of_bucket = f", bucket {self.bucket}" if self.bucket else ""
        return f"rank {self.rank} ({self.host}, process {self.pid}) at step {self.step}, {self.phase}{of_bucket}"

    @property
    def progress(self) -> tuple[int, int]:
        """How far it is; what is done beside steps comes after the step."""
        return self.step, _ORDER.index(self.phase) if self.phase in _ORDER else len(_ORDER)


class LostRank(RuntimeError):
    """Another rank is lost, has failed or hangs; the message names it."""


class Watchdog:
    """Watches the ranks of a run, as a context manager; does nothing where there is one process.

    Where a collective fails in it, it waits until it is known which rank is to blame, and raises LostRank. Where the
    training is stuck, it ends the process, with EXIT_STATUS.

    Args:
        dead_after: seconds of silence in a step after which a rank counts as lost; beside steps SILENCE_BESIDE.
        hang_timeout: seconds without any rank's progress after which the run is ended.
        every: seconds between two lines.
    """

    def __init__(self, processes: Processes, dead_after: float, hang_timeout: float, every: float | None = None):
        self.processes, self.dead_after, self.hang_timeout = processes, dead_after, hang_timeout
        self.every = min(2.0, dead_after / 4) if every is None else every
        self.own = Place(processes.rank, socket.gethostname(), machine_id(), os.getpid())
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._decided = threading.Event()
        self._verdict = ""
        self._kills = True
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        # gloo's errors have no type of their own.
        if isinstance(error, dist.DistError) or type(error) is RuntimeError:
            verdict = self._explain()
            self.stop(f"{kind.__name__}: {error}")
            if verdict:
                raise LostRank(verdict) from error
        else:
            self.stop("" if error is None else f"{kind.__name__}: {error}")

    def start(self) -> None:
        """Begins to watch; all ranks take part."""
        if self.processes.world_size == 1:
            return
        name = [uuid.uuid4().hex]  # of this start of the run: the store outlives those before
        dist.broadcast_object_list(name, device=self.processes.device)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the training's may be held by a call that waits.
        timeout = timedelta(seconds=self.dead_after)
        store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        self._store = dist.PrefixStore(f"stdit_fast/{name[0]}", store)
        self._write()
        self.processes.barrier()  # so that all have written
        places = self._read()  # by which a rank is known that is lost before the first look
        self._thread = threading.Thread(target=self._watch, args=(places,), name="watchdog", daemon=True)
        self._thread.start()

    def at(self, step: int, phase: str, bucket: str = "") -> None:
        """Says where this rank is from now on; costs nothing."""
        with self._lock:
            self.own = replace(self.own, step=step, phase=phase, bucket=bucket, count=self.own.count + 1)

    def stop(self, error: str = "") -> None:
        """Ends the watch on this rank: as it should be, or with the error that it leaves for."""
        if self._thread is None:
            return
        self._stopped.set()
        self._thread.join()
        self._thread = None
        with self._lock:
            self.own = replace(self.own, error=error, done=not error)
        with suppress(RuntimeError, OSError):  # the store may have gone with those who kept it
            self._write()

    def _explain(self) -> str:
        """Which rank is to blame where a collective has failed; empty: none, after as long as silence takes to show."""
        if self._thread is not None:
            self._kills = False
            self._decided.wait(self.dead_after + 3 * self.every)
        return self._verdict

    # ------------------------------------------------------------ the thread

    def _watch(self, places: list[Place]) -> None:
        seen = {place.rank: (place, time.monotonic()) for place in places}
        progress, since, warned = (), time.monotonic(), False
        unreachable = None
        while not self._stopped.wait(self.every):
            now = time.monotonic()
            try:
                self._write()
                places = self._read()
                unreachable = None
            except (RuntimeError, OSError) as error:
                unreachable = unreachable or now
                # Rank 0 may have kept the store, and may be seen to be gone.
                verdict = _lost([seen[0]], self.own.machine, now, self.dead_after)
                if now - unreachable > self.dead_after:
                    verdict = verdict or f"rank 0's machine is lost: its key-value store does not answer ({error})"
                self._decide(verdict)
                continue
            for place in places:
                if place.rank not in seen or seen[place.rank][0] != place:
                    seen[place.rank] = place, now
            if self.processes.is_main:
                verdict = _lost([seen[p.rank] for p in places], self.own.machine, now, self.dead_after)
                counts = tuple(p.count for p in places)
                if counts != progress or any(p.phase == BESIDE for p in places):
                    progress, since, warned = counts, now, False
                late = min(places, key=lambda p: p.progress)
                ahead = max(places, key=lambda p: p.progress)  # it waits there, in a bucket's collective
                standing = f"no rank has got on for {now - since:.0f} s; the least far is {late}"
                if ahead.progress > late.progress:
                    standing += f", and the furthest is {ahead}"
                if now - since > self.hang_timeout / 4 and not warned and not verdict:
                    logger.warning("%s", standing)
                    warned = True
                if now - since > self.hang_timeout:
                    verdict = verdict or standing
                if verdict:
                    self._store.set("verdict", verdict)
                    self._decide(verdict)
            else:
                given = self._store.get("verdict").decode() if self._store.check(["verdict"]) else ""
                self._decide(given or _lost([seen[0]], self.own.machine, now, self.dead_after))

    def _decide(self, verdict: str) -> None:
        """Ends this process with the verdict, if there is one, unless it is waited for."""
        if not verdict:
            return
        self._verdict = verdict
        self._decided.set()
        if self._kills:
            print(f"error: {verdict}; rank {self.own.rank} ends", file=sys.stderr, flush=True)
            if self.processes.is_main:
                time.sleep(2 * self.every)  # the others read it from the store, which may end with this process
            os._exit(EXIT_STATUS)  # the training may be stuck where nothing else reaches it
        self._stopped.set()

    def _write(self) -> None:
        with self._lock:
            self.own = replace(self.own, beats=self.own.beats + 1)
            line = json.dumps(asdict(self.own))
        self._store.set(f"rank/{self.own.rank}", line)

    def _read(self) -> list[Place]:
        ranks = range(self.processes.world_size) if self.processes.is_main else [0]
        lines = self._store.multi_get([f"rank/{rank}" for rank in ranks])
        return [Place(**json.loads(line)) for line in lines]


def _lost(seen: list[tuple[Place, float]], machine: str, now: float, dead_after: float) -> str:
    """The first rank that has failed or is gone, in words; empty: none.

    Args:
        seen: each rank's last line, and when it came.
    """
    for place, _ in seen:
        if place.error:
            return f"{place} has failed: {place.error}"
    for place, when in seen:
        if place.done:
            continue
        if place.machine == machine and not _lives(place.pid):
            return f"{place} is lost: its process has ended"
        allowed = max(dead_after, SILENCE_BESIDE) if place.phase == BESIDE else dead_after
        if now - when > allowed:
            return f"{place} is lost: nothing was heard of it for {now - when:.0f} s"
    return ""


def _lives(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
