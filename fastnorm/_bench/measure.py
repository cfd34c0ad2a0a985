"""Times of several calls, interleaved in one process, and the speed of memory around them.

The machine is shared: its bus is twice as fast in one second as in another. So every figure is a ratio within one run.
All calls of a case take turns until the case's time is over; in each turn the threads of the last one are left to go to
sleep, a call runs untimed until caches and threads are as they are in a loop of nothing else, and then timed. A time is
the 20 % quantile of many: what the code costs when the neighbours are quiet, and steadier than the minimum. What two
calls are compared by are not these times but the turns of each round, which saw the same bus: `results.paired`.
"""

from __future__ import annotations

import gc
import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._runtime import kernels

QUANTILE = 0.2
PAUSE = 10e-3        # seconds before a turn: libgomp's idle threads spin for 4 ms, on cores that the next rival wants
WARM = 15e-3         # seconds of untimed calls: the caches fill, and the rival's threads wake up, in up to 6 ms
TURN = 5e-3          # seconds of timed calls
SLOW = 20e-3         # calls beyond this find nothing in the caches anyway, and are not repeated to warm up
MIN_TURNS = 7
FAR = 10             # times as slow as the fastest: one turn will do, and leaves the time to the others
LONGEST = 6          # times the seconds of a case, which MIN_TURNS of slow calls may take
LIMIT_BYTES = 128 << 20  # of an array of the bandwidth loops: far beyond the last-level cache
LIMIT_EVERY = 0.25   # seconds
LIMIT_AFTER = 2e-3   # seconds of a call, after each turn of which the limit is measured: the bus may have changed
ASLEEP = 0.05        # seconds after which the threads of every rival have gone to sleep


def quantile(values: Sequence[float], q: float) -> float:
    """The value that a share ``q`` of the others lies below.

    Examples
    --------
    >>> quantile([5.0, 1.0, 2.0, 3.0, 4.0], 0.2)
    2.0
    """
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


@dataclass
class Call:
    """One competitor in one form."""

    rival: str
    mode: str                                     # where results go: `cases.FRESH`, `OUT` or `IN_PLACE`
    run: Callable[[], Any]
    variant: str = ""                             # which of the rival's ways to do it
    threads: int = 1
    level: str = ""                               # of fastnorm's own
    prepare: Callable[[], Any] | None = None      # before a turn: threads, instruction set
    reset: Callable[[], Any] | None = None        # before each call: what the call has destroyed
    cold: bool = False                            # whether cold calls are of interest


@dataclass
class Timing:
    """Seconds a call."""

    low: float                                    # the 20 % quantile
    median: float
    high: float                                   # the 80 % quantile
    calls: int
    cold: float | None = None                     # median of calls with nothing in the caches and threads asleep
    page_faults: float = 0.0                      # a call
    turns: list[tuple[int, int, float]] = field(default_factory=list)  # of each: round, sample of the limit, low


@dataclass
class Limit:
    """The speed of memory, sampled while a case runs, by the loops of ``_kernels/bandwidth.pyx``."""

    threads: int
    arrays: list[Any] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Touch the memory, so that its pages are there."""
        n = LIMIT_BYTES // 4
        self.arrays = [np.ones(n, np.float32), np.ones(n, np.float32)]

    def start(self) -> None:
        """Forget what was sampled."""
        self.rates = {"read": [], "copy": [], "update": []}

    def sample(self) -> None:
        """Time each loop twice and keep the faster one."""
        a, b = self.arrays
        loops: dict[str, tuple[int, Callable[[], Any]]] = {
            "read": (1, lambda: kernels.bandwidth.read(a, self.threads)),
            "copy": (2, lambda: kernels.bandwidth.copy(a, b, True, self.threads)),
            "update": (2, lambda: kernels.bandwidth.update(b, 0.5, 0.5, self.threads))}
        for name, (times, loop) in loops.items():
            self.rates[name].append(times * a.nbytes / min(_timed(loop), _timed(loop)))

    def result(self) -> dict[str, float]:
        """Bytes a second of each loop, at the same quantile as the calls."""
        return {name: quantile(rates, 1 - QUANTILE) for name, rates in self.rates.items()}

    def samples(self) -> list[dict[str, float]]:
        """Bytes a second of each loop, sample by sample."""
        return [dict(zip(self.rates, rates, strict=True)) for rates in zip(*self.rates.values(), strict=True)]

    def spread(self) -> float:
        """How much faster the bus was at its best than at its median, while the case ran; 0 is steady."""
        return max(max(rates) / statistics.median(rates) - 1 for rates in self.rates.values())

    def evict(self) -> None:
        """Replace whatever the caches hold."""
        kernels.bandwidth.update(self.arrays[1], 0.5, 0.5, self.threads)


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class _Competitor:
    """A call and its times so far."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.times: list[float] = []
        self.turns: list[tuple[int, int, float]] = []
        self.cold: list[float] = []
        self.spent = 0.0
        self.faults = self.faults_calls = 0

    def turn(self, round_: int, sample: int) -> None:
        """Let the others' threads fall asleep, warm up, and time calls, at least one; note the round and the sample of
        the limit that was the last before.
        """
        start = time.perf_counter()
        call = self.call
        if call.prepare:
            call.prepare()
        time.sleep(PAUSE)
        last = self.times[-1] if self.times else 0.0
        warm = time.perf_counter() + WARM
        while last < SLOW and time.perf_counter() < warm:
            last = self._once()
        before, calls, until = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 0, time.perf_counter() + TURN
        while not calls or time.perf_counter() < until:
            self.times.append(self._once())
            calls += 1
        self.faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        self.faults_calls += calls
        self.turns.append((round_, sample, quantile(self.times[-calls:], QUANTILE)))
        self.spent += time.perf_counter() - start

    def cold_turn(self, limit: Limit) -> None:
        """One call that finds neither its data in the caches nor its threads awake."""
        if self.call.prepare:
            self.call.prepare()
        if self.call.reset:
            self.call.reset()
        limit.evict()
        time.sleep(ASLEEP)
        self.cold.append(_timed(self.call.run))

    def _once(self) -> float:
        if self.call.reset:
            self.call.reset()
        return _timed(self.call.run)

    def timing(self) -> Timing:
        return Timing(quantile(self.times, QUANTILE), statistics.median(self.times),
                      quantile(self.times, 1 - QUANTILE), len(self.times),
                      statistics.median(self.cold) if self.cold else None, self.faults / self.faults_calls, self.turns)

    def wants_turns(self, fastest: float) -> bool:
        """Whether it has had too few, beside a competitor that takes so many seconds."""
        return not self.turns or (len(self.turns) < MIN_TURNS and min(self.times) < FAR * fastest)


def measure(calls: Sequence[Call], seconds: float, limit: Limit, cold_calls: int = 0) -> list[Timing]:
    """Time the calls, interleaved, for about so many seconds in all; sample the limit before, between and after.

    Each call gets an equal share of the time, however slow it is: a slow one sits out rounds. Where `MIN_TURNS` of each
    take longer, up to `LONGEST` times the seconds are taken.
    """
    competitors = [_Competitor(call) for call in calls]
    share = seconds / max(1, len(calls))
    limit.start()
    was_enabled, samples = gc.isenabled(), 0
    gc.disable()
    try:
        for competitor in competitors:  # compile, allocate, load: not timed
            if competitor.call.prepare:
                competitor.call.prepare()
            competitor._once()
        start = sampled = time.perf_counter()
        limit.sample()
        for round_ in itertools.count():
            elapsed = time.perf_counter() - start
            fastest = min((min(c.times) for c in competitors if c.times), default=0.0)
            wanting = [c for c in competitors if c.wants_turns(fastest)]
            if round_ and (elapsed >= LONGEST * seconds or (elapsed >= seconds and not wanting)):
                break
            due = [c for c in competitors if c in wanting or c.spent <= share * elapsed / seconds]
            for competitor in due or [min(competitors, key=lambda c: c.spent)]:
                competitor.turn(round_, samples)
                if competitor.times[-1] > LIMIT_AFTER or time.perf_counter() - sampled > LIMIT_EVERY:
                    limit.sample()
                    samples += 1
                    sampled = time.perf_counter()
        for _ in range(cold_calls):
            for competitor in competitors:
                if competitor.call.cold:
                    competitor.cold_turn(limit)
        limit.sample()
    finally:
        if was_enabled:
            gc.enable()
    return [competitor.timing() for competitor in competitors]


def record(call: Call, timing: Timing) -> dict[str, Any]:
    """One row of the JSON."""
    return {"rival": call.rival, "variant": call.variant, "mode": call.mode, "threads": call.threads,
            "level": call.level, **asdict(timing)}


def peak_memory(run: Callable[[], Any]) -> int | None:
    """Bytes of resident memory that a call needs beyond what there was; None where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    try:
        run()
        reset.write_text("5")  # the peak is what there is now
        before = kilobytes("VmRSS")
        run()
        return max(0, kilobytes("VmHWM") - before) * 1024
    except (OSError, StopIteration):
        return None


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios.

    Examples
    --------
    >>> geometric_mean([1.0, 4.0])
    2.0
    """
    return math.exp(statistics.fmean(map(math.log, values)))
