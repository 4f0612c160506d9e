"""Measuring instruments: interleaved timing, the bandwidth limit, peak memory. Nothing here knows ops or providers."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spo_kernels import backends

# A case of short calls gets more rounds than asked for, so that the calls of the slowest entry add up to
# _ENOUGH_SECONDS, but at most _MORE_ROUNDS times as many.
_MORE_ROUNDS = 20
_ENOUGH_SECONDS = 0.5
# A call that follows another provider's call finds its code and threads cold, which matters for calls of microseconds.
# If all calls are shorter than _SHORT_SECONDS, an entry's turn is a burst of calls, of which the median counts.
_SHORT_SECONDS = 0.01
# More than the last-level cache of any GPU holds (256 MiB on an MI300X). The GPU reads it for so long that Python
# launches the call meanwhile. Events around the call then measure the device's time, not Python's.
_FLUSH_BYTES = 512 << 20


def nothing() -> None:
    return None


@dataclass(frozen=True)
class Entry:
    """A call to time. prepare runs before each call and finish after it, outside the timed region."""

    call: Callable[[], object]
    prepare: Callable[[], None] = nothing
    finish: Callable[[], None] = nothing


@dataclass
class Samples:
    """Seconds of each round: wall time, and CPU time of the whole process (all threads)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round. A drift of the machine's speed between rounds cancels."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


class Clock:
    """Times one call: wall time, and CPU time of the process.

    On a GPU the caches are evicted first, and the device's time between two events replaces the wall time.

    device: a GPU must be torch's current device, to which events belong.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._flush = torch.zeros(_FLUSH_BYTES // 4, device=device)
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        if self._cuda:
            self._flush.sum()  # a read, since written lines would be written back within the timed region
            self._start.record()  # queued behind the flush, so Python does not wait here
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        if self._cuda:
            self._end.record()
            self._end.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        del result  # memory is given back outside the timed region
        return (self._start.elapsed_time(self._end) / 1e3 if self._cuda else wall), cpu


def _time_once(clock: Clock, entry: Entry) -> tuple[float, float]:
    entry.prepare()
    times = clock.time(entry.call)
    entry.finish()
    return times


def interleave(
    entries: dict[str, Entry],
    device: torch.device,
    repeats: int,
    every_round: Callable[[], None] = nothing,
    *,
    burst_of_short_calls: int = 5,
) -> dict[str, Samples]:
    """Time all entries in turns, one call each a round, so that a change of the machine's speed affects all of them.

    The first round is warm-up and is not counted. There are `repeats` further rounds, or more if calls are short. The
    order rotates, so that each entry takes each place in a round. If all calls are short, a turn is the median of
    `burst_of_short_calls`.
    """
    clock = Clock(device)
    labels = list(entries)

    def one_round(start: int, burst: int) -> dict[str, tuple[float, float]]:
        times = {}
        for label in labels[start:] + labels[:start]:
            walls, cpus = zip(*(_time_once(clock, entries[label]) for _ in range(burst)), strict=True)
            times[label] = statistics.median(walls), statistics.median(cpus)
        every_round()
        return times

    warm_up = one_round(0, 1)
    slowest = max(wall for wall, _ in warm_up.values())
    burst = burst_of_short_calls if slowest < _SHORT_SECONDS else 1
    rounds = max(repeats, min(_MORE_ROUNDS * repeats, int(_ENOUGH_SECONDS / slowest)))
    samples = {label: Samples() for label in labels}
    for index in range(rounds):
        for label, (wall, cpu) in one_round(index % len(labels), burst).items():
            samples[label].wall.append(wall)
            samples[label].cpu.append(cpu)
    return samples


class Bandwidth:
    """The limit: bytes a second at which simple loops read an array of `nbytes`, and read and write it.

    On a GPU both rates are those of ``copy_``. On a CPU with the compiled kernels, the loops are the control module's,
    on `threads` threads (csrc/python/bandwidth_probe.h). On a CPU without them, ``torch.sum`` and ``torch.add_`` stand
    in. These are slower, and `source` says so.

    Call `sample` once in every round of the timed calls, the warm-up included. A round's calls are compared with the
    rates of that round, since other tenants of a machine's memory may halve its rate for minutes.
    """

    def __init__(self, nbytes: int, device: torch.device, threads: int, clock: Clock | None = None) -> None:
        self._array = torch.ones(max(nbytes // 4, 1), dtype=torch.float32, device=device)
        self._nbytes = self._array.nbytes
        self._clock = clock or Clock(device)
        self._threads = threads
        self._control = None
        if device.type == "cpu" and backends.active("cpu") == "cpu":
            from spo_kernels.backends import cpu

            self._control = cpu.load()
        self._copy = torch.empty_like(self._array) if device.type == "cuda" else None
        if self._copy is not None:
            self.source = "torch.Tensor.copy_"
        else:
            self.source = "stream loops" if self._control else "torch.sum and torch.add_ (too low)"
        self.read: list[float] = []  # bytes a second, by round
        self.update: list[float] = []

    def sample(self) -> None:
        if self._copy is not None:
            seconds, _ = self._clock.time(partial(self._copy.copy_, self._array))
            read, update = seconds / 2, seconds  # a copy moves the array twice
        elif self._control:
            array = self._array.numpy()
            read = self._control.seconds_to_read(array, self._threads)
            update = self._control.seconds_to_update(array, self._threads)
        else:
            read, _ = self._clock.time(self._array.sum)
            update, _ = self._clock.time(lambda: self._array.add_(0.0))
        self.read.append(self._nbytes / read)
        self.update.append(2 * self._nbytes / update)


def touch(tensors: Sequence[Tensor]) -> None:
    """Read the tensors once. Afterwards a cache holds them if they fit."""
    for tensor in tensors:
        tensor.view(torch.uint8).amax()


def last_level_cache_bytes() -> int:
    """Size of the largest CPU cache; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=32 << 20)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be allocated without swapping; None where the system does not say."""
    if device.type == "cuda":
        # The driver counts memory that torch holds for reuse as taken.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    return _kib_line(meminfo, "MemAvailable") if meminfo.exists() else None


def _kib_line(path: Path, key: str) -> int:
    """Bytes of a line such as ``VmRSS:  1234 kB``."""
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(lines[key].split()[0]) << 10


@dataclass(frozen=True)
class PeakMemory:
    """Peak bytes beyond what was allocated before the call."""

    allocator: int  # torch's allocations, to the byte
    resident: int | None  # rise of the process's resident memory, by any allocator; None where the system does not say


def peak_memory(entry: Entry, device: torch.device) -> PeakMemory:
    """Peak memory of one call. On a CPU a second call is made, to measure resident memory."""
    if device.type == "cuda":
        entry.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        entry.call()
        entry.finish()
        return PeakMemory(torch.cuda.max_memory_allocated(device) - before, None)
    entry.prepare()
    allocator = _peak_allocated(entry.call)
    entry.finish()
    entry.prepare()
    resident = _peak_resident(entry.call)
    entry.finish()
    return PeakMemory(allocator, resident)


def _peak_allocated(call: Callable[[], object]) -> int:
    """Replay the allocations and frees that the profiler saw, which include compiled graphs and our own kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event["name"] == "[memory]" and event["args"]["Device Type"] == 0
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _peak_resident(call: Callable[[], object]) -> int | None:
    """Rise of the high-water mark of resident pages. Linux lets a process reset its own mark."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _kib_line(status, "VmRSS")
    call()
    return max(_kib_line(status, "VmHWM") - before, 0)
