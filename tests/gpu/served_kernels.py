"""What the tests share that ask which of Hopper's kernels serves a call."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

ON_HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="of Hopper's kernels"
)


def kernels_of(function, *args, **options):
    """The names of the GPU's kernels and copies that a call runs."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        function(*args, **options)
        torch.cuda.synchronize()
    return [event.name for event in seen.events()]
