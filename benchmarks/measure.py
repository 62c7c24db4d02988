"""How time, memory and ratios are measured: the same way for every group of the suite."""

import ctypes
import functools
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

# Written between rounds on a GPU, to push the operands out of its L2 cache: 50 MB on an H100, 126 MB on a B200.
FLUSH_BYTES = 256 * 2**20
RESAMPLES = 2000
# OpenMP's threads keep spinning for milliseconds behind their work, and what has threads of its own would run beside
# them. Ours decodes on that team; while it had its own, 90 ms of it took 8 % longer directly behind an OpenMP region.
SETTLE_SECONDS = 0.02


class Scale(NamedTuple):
    """How long one measurement goes on.

    Attributes:
        seconds: the time that its rounds fill.
        least_rounds: as many in any case, unless they would take more than `patience` seconds; never below 2.
        most_rounds: no more than these.
    """

    seconds: float
    least_rounds: int
    most_rounds: int
    patience: float


SCALES = {"smoke": Scale(0.02, 3, 5, 1.0), "laptop": Scale(3.0, 5, 30, 20.0), "gpu": Scale(1.0, 20, 200, 30.0)}


class EventClock:
    """Seconds of device time between two readings, by CUDA events; read in pairs, as pytest-benchmark does.

    The device is not waited for before the first reading: what `flush` has queued there keeps it busy while the host
    launches, so that the host's share is not counted where a training step would hide it as well.
    """

    __name__ = "cuda_events"

    def __init__(self):
        self._start = None
        self._elapsed = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._start is None:
            self._start = event
        else:
            event.synchronize()
            self._elapsed += self._start.elapsed_time(event) / 1e3
            self._start = None
        return self._elapsed


def clock(device: str) -> Callable[[], float]:
    """The clock for `device`: its difference around a call is the call's seconds."""
    return EventClock() if device == "cuda" else time.perf_counter


def flush(device: str) -> None:
    """Clears the GPU's L2 cache. A CPU's caches stay: the operands of a training step are larger, or in use."""
    if device == "cuda":
        _flush_buffer().zero_()


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def seconds(function: Callable[[], object], device: str, pause: float = 0.0) -> float:
    """One call's time, after a pause."""
    time.sleep(pause)
    flush(device)
    read = clock(device)
    start = read()
    function()
    return read() - start


def prepare(functions: Collection[Callable[[], object]]) -> None:
    """Calls the method `prepare` of those that have one: what each of their rounds needs and nobody times."""
    for function in functions:
        if hasattr(function, "prepare"):
            function.prepare()


def rounds(functions: Collection[Callable[[], object]], device: str, scale: Scale) -> int:
    """How many rounds of all these to run, by one call of each, which also warms up."""
    prepare(functions)
    once = sum(seconds(function, device) for function in functions)
    least = min(scale.least_rounds, scale.patience / once)
    return int(min(max(scale.seconds / once, least, 2), scale.most_rounds))


def timed(benchmark, function: Callable[[], object], device: str, scale: Scale) -> None:
    """Fills pytest-benchmark's fixture with rounds of `function`."""
    benchmark.pedantic(function, setup=lambda: flush(device), rounds=rounds([function], device, scale))


class Ratio(NamedTuple):
    """The median over rounds, of one time divided by another unless said otherwise, and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    rounds: int


def ratio(numerators, denominators) -> Ratio:
    """Of times taken in turn: both of a round meet the same machine, so that its drift cancels in their quotient."""
    quotients = np.asarray(numerators, dtype=float) / np.asarray(denominators, dtype=float)
    return median(quotients)


def median(values) -> Ratio:
    """The median of values, and its interval."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return Ratio(float(np.median(values)), float(low), float(high), len(values))


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Sum : sum of times taken in turn, rounds drawn in pairs: for what is waited for as a whole."""
    pairs = np.stack([np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)])
    picked = np.random.default_rng(0).integers(pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
    over, under = pairs[:, picked].sum(axis=-1)
    low, high = np.quantile(over / under, (0.025, 0.975))
    return Ratio(float(pairs[0].sum() / pairs[1].sum()), float(low), float(high), pairs.shape[1])


class Turns(NamedTuple):
    """Times that were taken in turn, round by round; empty where benchmarks are switched off.

    Attributes:
        own: of the function that pytest-benchmark's fixture has.
        others: name -> of the others.
    """

    own: Sequence[float]
    others: Mapping[str, Sequence[float]]

    def ratios(self) -> dict[str, Ratio]:
        """Name -> time of the function : time of the other one."""
        return {name: ratio(self.own, taken) for name, taken in self.others.items() if self.own}


def paired(
    benchmark,
    function: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
    device: str,
    scale: Scale,
    pause: float = 0.0,
) -> dict[str, Ratio]:
    """`in_turn`, compared round by round: name -> time of `function` : time of the other one."""
    return in_turn(benchmark, function, others, device, scale, pause).ratios()


def in_turn(
    benchmark,
    function: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
    device: str,
    scale: Scale,
    pause: float = 0.0,
    wanted: int | None = None,
) -> Turns:
    """Runs the others and `function` in turn, A B C A B C ...

    Those that have a method `prepare` are prepared in front of every round, which is not timed. `pause` seconds pass
    before every call. pytest-benchmark's fixture gets the times of `function`.

    Args:
        wanted: so many rounds, and no call before them; None: as `scale` says, behind one call of each.
    """
    wanted = rounds([function, *others.values()], device, scale) if wanted is None else wanted
    times = {name: [] for name in others}

    def run_the_others():
        prepare([function, *others.values()])
        for name, other in others.items():
            times[name].append(seconds(other, device, pause))
        time.sleep(pause)
        flush(device)

    benchmark.pedantic(function, setup=run_the_others, rounds=wanted)
    own = [] if benchmark.stats is None else list(benchmark.stats.stats.data)
    return Turns(own, {name: taken[: len(own)] for name, taken in times.items()})


class Memory(NamedTuple):
    """Memory of one call, in bytes above the level before it.

    Attributes:
        peak: the most at any time, results included.
        kept: what stayed afterwards beside its results.
        method: "allocator" (torch's, CUDA), "high-water mark" (resident set, by the kernel) or "sampled" (resident
            set every millisecond, where the kernel's mark cannot be reset).
    """

    peak: int
    kept: int
    method: str


def peak_memory(function: Callable[[], Sequence[torch.Tensor]], device: str) -> tuple[Memory, Sequence[torch.Tensor]]:
    """Runs `function` once; also returns its results.

    What an earlier call has kept is part of the level before, so that the first call is the one to measure.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = function()
        torch.cuda.synchronize()
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return Memory(peak - before, after - before - _size(found), "allocator"), found
    return_free_memory()
    before = psutil.Process().memory_info().rss
    if _reset_high_water_mark():
        found = function()
        peak, method = _high_water_mark(), "high-water mark"
    else:
        peak, found = _sampled_peak(function)
        method = "sampled"
    return_free_memory()
    after = psutil.Process().memory_info().rss
    return Memory(max(0, peak - before), max(0, after - before - _size(found)), method), found


def _size(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def return_free_memory() -> None:
    """Gives freed heap back, or it would be used again without showing in the resident set (glibc keeps it)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: only the peak resident set, see proc(5)
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _sampled_peak(function: Callable[[], Sequence[torch.Tensor]]) -> tuple[int, Sequence[torch.Tensor]]:
    process, done, peak = psutil.Process(), threading.Event(), 0

    def sample():
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        found = function()
    finally:
        done.set()
        sampler.join()
    return peak, found
