"""How tools/benchmark.py measures: times, peak memory, and what a matrix product reaches."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

WARM_UP, WARM_UP_COMPILED = 3, 5  # runs; CUDA graphs are compiled, recorded and first replayed in three of them
MIN_RUNS, MAX_RUNS = 5, 300
FLUSHED = 256 * 2**20  # bytes, several times the L2 cache of any GPU
CYCLES = 2e6  # of a GPU's clock in a millisecond, at most
LONGEST_SLEEP = 50.0  # ms
MATMUL = {'cuda': 8192, 'cpu': 1024}  # n of the n*n*n product


class Clock:
    """Measures one step after the other.

    On a GPU a step is timed by two events around it, in one of two ways:

    * ``isolated``, for steps of some kernels: the GPU first sleeps for longer than the CPU needs to queue the step, so
      that the CPU's launch gaps are not in the time, then clears a buffer larger than the L2 cache, so that no step
      finds its inputs there. Whether the CPU was in time is checked; a step before which the GPU had to wait is run
      again after a longer sleep.
    * else, for whole models: one step after the other without a wait in between, as in training. If the CPU cannot
      keep up, that is part of the time.

    Args:
        device: where the steps run.
        seconds: how long to repeat a step; 5 to 300 runs.
        isolated: see above; of no effect on the CPU.
    """

    def __init__(self, device: torch.device, seconds: float, isolated: bool) -> None:
        self.cuda, self.seconds, self.isolated = device.type == 'cuda', seconds, isolated
        self.flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device) if self.cuda and isolated else None

    def measure(
        self, step: Callable[[], Any], reset: Callable[[], None], warm_up: int = WARM_UP, memory: bool = True
    ) -> dict[str, Any]:
        """Time and memory of a step.

        Args:
            step: what to measure.
            reset: what to do before each step outside the measurement, such as dropping the gradients of the last.
            warm_up: runs before the first that counts.
            memory: whether peak memory can be told; CUDA graphs keep theirs for good.

        Returns:
            ms (median), p10 and p90 (percentiles, ms), runs, host_ms (what the CPU needs to queue a step), waited (runs
            in which the GPU waited for the CPU in spite of the longest sleep), mib (peak above what was there before)
            and peak_mib (all of it); the last three None where they cannot be told.
        """
        for _ in range(warm_up - 1):
            reset()
            step()
        reset()
        self._synchronize()
        start = time.perf_counter()
        step()
        host = (time.perf_counter() - start) * 1e3
        self._synchronize()
        whole = (time.perf_counter() - start) * 1e3
        reset()
        mib, peak = self._memory(step) if self.cuda and memory else (None, None)
        reset()
        runs = max(MIN_RUNS, min(MAX_RUNS, int(self.seconds * 1e3 / whole)))
        waited = None
        if not self.cuda:
            times = self._on_cpu(step, reset, runs)
        elif self.isolated:
            times, waited = self._isolated(step, reset, runs, host)
        else:
            times = self._in_a_row(step, reset, runs)
        reset()
        times.sort()
        p10, median, p90 = (times[round(share * (len(times) - 1))] for share in (0.1, 0.5, 0.9))
        return dict(ms=median, p10=p10, p90=p90, runs=runs, host_ms=host, waited=waited, mib=mib, peak_mib=peak)

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _memory(self, step: Callable[[], Any]) -> tuple[float, float]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return (peak - before) / 2**20, peak / 2**20

    def _on_cpu(self, step: Callable[[], Any], reset: Callable[[], None], runs: int) -> list[float]:
        times = []
        for _ in range(runs):
            reset()
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def _in_a_row(self, step: Callable[[], Any], reset: Callable[[], None], runs: int) -> list[float]:
        """The first step, which starts on an idle GPU, does not count."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 2)]
        for event in events[:-1]:
            reset()
            event.record()
            step()
        events[-1].record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(events[1:])]

    def _isolated(
        self, step: Callable[[], Any], reset: Callable[[], None], runs: int, host: float
    ) -> tuple[list[float], int]:
        assert self.flushed is not None
        times, waited = [], 0
        sleep = min(LONGEST_SLEEP, 1.5 * host + 0.1)  # ms
        while len(times) < runs:
            reset()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(sleep * CYCLES))
            self.flushed.zero_()
            start.record()
            step()
            end.record()
            in_time = not start.query()  # all of the step was queued before the GPU came to it
            torch.cuda.synchronize()
            if not in_time and sleep < LONGEST_SLEEP:
                sleep = min(LONGEST_SLEEP, 2 * sleep)
                continue
            waited += not in_time
            times.append(start.elapsed_time(end))
        return times, waited


def matmul_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> tuple[int, float]:
    """What a large matrix product of random numbers reaches in this dtype: its n, and TFLOP/s."""
    n = MATMUL[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    clock = Clock(device, seconds, isolated=True)
    return n, 2 * n**3 / clock.measure(lambda: a @ b, lambda: None)['ms'] / 1e9
