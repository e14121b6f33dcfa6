"""Hundreds of random calls by the rule. HF_FLASH_FUZZ_COUNT=5000 runs more, HF_FLASH_FUZZ_SEED=17 that one alone."""

import pytest
import torch
from attention_fuzz import fuzz


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_random_calls_obey_the_rule(dtype):
    fuzz(150, "cpu", dtype)
