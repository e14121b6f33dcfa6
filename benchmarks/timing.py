"""Device times of a forward and a backward pass: medians over rounds in which the peers take turns."""

from __future__ import annotations

import statistics
import time

import torch


class Measured:
    """One peer in one case: its call, the warm-up, the samples."""

    def __init__(self, case, call):
        self.case, self.call = case, call
        self.forward_samples: list[float] = []
        self.backward_samples: list[float] = []
        self.out = None
        self.graphs = None

    def warm_up(self) -> None:
        for _ in range(2):
            out = self.call()
            torch.autograd.grad(out, self.case.inputs, self.case.dout)
        del out
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = self.call()
        torch.autograd.grad(out, self.case.inputs, self.case.dout)
        torch.cuda.synchronize()
        self.peak_mib = (torch.cuda.max_memory_allocated() - base) / 2**20
        del out
        if self.case.graph:
            self._capture()
        else:
            self.out = self.call()
        self.forward_count = _count(self._forward)
        self.backward_count = _count(self._backward)

    def _capture(self) -> None:
        """Two graphs: the forward, and both passes; the backward is their difference."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.autograd.grad(self.call(), self.case.inputs, self.case.dout)
        torch.cuda.current_stream().wait_stream(side)
        forward, both = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward):
            self.call()
        with torch.cuda.graph(both):
            torch.autograd.grad(self.call(), self.case.inputs, self.case.dout)
        self.graphs = (forward, both)

    def _forward(self) -> None:
        self.graphs[0].replay() if self.graphs else self.call()

    def _backward(self) -> None:
        if self.graphs:
            self.graphs[1].replay()
        else:
            torch.autograd.grad(self.out, self.case.inputs, self.case.dout, retain_graph=True)

    def sample(self) -> None:
        self.forward_samples.append(_milliseconds(self._forward, self.forward_count))
        self.backward_samples.append(_milliseconds(self._backward, self.backward_count))

    def medians(self) -> tuple[float, float]:
        forward, backward = statistics.median(self.forward_samples), statistics.median(self.backward_samples)
        return forward, backward - forward if self.graphs else backward

    def release(self) -> None:
        self.out = self.graphs = self.call = None


def _milliseconds(run, count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def _count(run, budget_ms: float = 8.0) -> int:
    """Repetitions a sample, so that one takes about ``budget_ms``."""
    return max(1, min(100, int(budget_ms / max(_milliseconds(run, 1), 1e-3))))


def host_microseconds(call, count: int = 300) -> float:
    """Host time of one asynchronous call: the best of five loops, each followed by a synchronisation."""
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - begin) / count * 1e6)
    torch.cuda.synchronize()
    return best
