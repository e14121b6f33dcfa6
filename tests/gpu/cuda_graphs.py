"""Capturing a step in a CUDA graph, for the tests that replay one."""

import torch


def captured(step):
    """(graph, what ``step()`` returned in it), after three calls on another stream that load and allocate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
