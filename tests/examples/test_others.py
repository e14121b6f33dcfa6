"""finetune_gpt2_long.py and trainer_callback.py from end to end on tiny models."""

import json
import re

import pytest


@pytest.mark.architectures("default")
def test_gpt2(run_example, tmp_path, device):
    out = run_example(
        "finetune_gpt2_long.py", "--layers", 1, "--hidden", 64, "--vocabulary", 400, "--files", 8, "--max-length", 128,
        "--batch-size", 3, "--steps", 8, "--learning-rate", 3e-3, "--output", tmp_path,
        device=device,
    ).stdout  # fmt: skip
    assert (" float32\n" in out) == (device == "cpu")
    assert "100.0%" in out and "\nok   packed loss" in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert abs(metrics["packed_loss"] / metrics["separate_loss"] - 1) < 1e-2
    assert len(metrics["losses"]) == 8 and metrics["losses"][-1] < metrics["losses"][0]
    assert metrics["held_out_after"] < metrics["held_out_before"]
    assert metrics["tokens_per_second"] > 0
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_gpt2_wrong_options(run_example, tmp_path):
    error = run_example("finetune_gpt2_long.py", "--hidden", 100, code=2).stderr
    assert "--hidden is 100; it must be a multiple of 64" in error
    error = run_example("finetune_gpt2_long.py", "--model", tmp_path / "nothing", "--files", 4, code=2).stderr
    assert "could not be loaded as a causal language model" in error


@pytest.mark.architectures("default")
def test_trainer_callback(run_example, tmp_path, device):
    out = run_example("trainer_callback.py", "--steps", 5, "--output", tmp_path, device=device).stdout
    assert re.search(r"2 patched; 100\.0% of \d+ attention calls served", out)
    assert "hf_flash" not in (tmp_path / "model" / "config.json").read_text()


def test_help(run_example):
    assert "--max-length" in run_example("finetune_gpt2_long.py", "--help").stdout
    assert "--steps" in run_example("trainer_callback.py", "--help").stdout
