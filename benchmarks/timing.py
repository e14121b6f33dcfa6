"""Device times of a forward and a backward pass: medians over rounds in which the peers take turns.

Everything runs on one stream of our own, which is also the one that CUDA graphs are captured on. A backward pass runs
on the streams that its forward pass saw: a tensor of the autograd graph made on the default stream would pull that
stream into a capture, which ends it with an error.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time

import torch


@contextlib.contextmanager
def environment(variables: dict[str, str]):
    """The process's environment with these variables in it, for what reads it at every call."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


class Measured:
    """One peer in one case: its call, the warm-up, the samples."""

    def __init__(self, case, call, variables: dict[str, str]):
        self.case, self.call, self.variables = case, call, variables
        self.forward_samples: list[float] = []
        self.backward_samples: list[float] = []
        self.out = None
        self.graphs = None

    def warm_up(self) -> None:
        """Compiles, plans and allocates; measures the memory; captures where the case says so."""
        with environment(self.variables):
            for _ in range(2):
                out = self.call()
                torch.autograd.grad(out, self.case.inputs, self.case.dout)
            del out
            gc.collect()  # what the cell before left would be freed in between
            torch.cuda.synchronize()
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            out = self.call()
            torch.autograd.grad(out, self.case.inputs, self.case.dout)
            torch.cuda.synchronize()
            self.peak_mib = (torch.cuda.max_memory_allocated() - base) / 2**20
            del out
            if "graph" in self.case.terms:
                self._capture()
            else:
                self.out = self.call()
            self.forward_count = _count(self._forward)
            self.backward_count = _count(self._backward)

    def _capture(self) -> None:
        """A graph of the forward and one of the backward, which reads what the first one saved."""

        def forward():
            self.out = self.call()

        def backward():
            self._gradients = torch.autograd.grad(self.out, self.case.inputs, self.case.dout, retain_graph=True)

        first = capture(forward)
        self.graphs = (first, capture(backward, first.pool()))
        self.graphs[0].replay()  # capturing runs nothing: the backward's samples need a forward before them

    def _forward(self) -> None:
        self.graphs[0].replay() if self.graphs else self.call()

    def _backward(self) -> None:
        if self.graphs:
            self.graphs[1].replay()
        else:
            torch.autograd.grad(self.out, self.case.inputs, self.case.dout, retain_graph=True)

    def sample(self) -> None:
        with environment(self.variables):
            self.forward_samples.append(_milliseconds(self._forward, self.forward_count))
            self.backward_samples.append(_milliseconds(self._backward, self.backward_count))

    def medians(self) -> tuple[float, float]:
        return statistics.median(self.forward_samples), statistics.median(self.backward_samples)

    def release(self) -> None:
        self.case = self.out = self.graphs = self.call = self._gradients = None


def capture(run, pool=None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what ``run`` launches on the current stream."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            run()
    except Exception:
        end_capture(graph, stream)
        raise
    return graph


def end_capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """Puts right what torch leaves behind when a capture fails, so that the next peer finds nothing of it.

    torch.cuda.graph then stops in the middle of its own end: the stream may still capture, the allocator may still
    serve from the graph's pool, and the random generator still counts offsets for the graph.
    """
    torch.cuda.set_stream(stream)
    with contextlib.suppress(Exception):
        if torch.cuda.is_current_stream_capturing():
            graph.capture_end()
    with contextlib.suppress(Exception):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), graph.pool())
    with contextlib.suppress(Exception):
        graph.reset()
    with contextlib.suppress(Exception):  # a capture that ends well gives the generator its own offsets back
        one = torch.zeros(1, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            one.add_(1)
    with contextlib.suppress(Exception):  # the error is sticky in the runtime until somebody has read it
        torch.cuda.synchronize()
    torch.cuda.synchronize()


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
    if _milliseconds(run, 1) > budget_ms:
        return 1
    return max(1, min(100, int(budget_ms / max(_milliseconds(run, 1), 1e-3))))  # the first may have loaded kernels


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
