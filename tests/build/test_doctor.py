"""``python -m hf_flash``: doctor asks the code what it can do, bench and explain say what is missing."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_flash import __main__ as command
from hf_flash import ops, support

CSRC = Path(__file__).parents[2] / "csrc"
CXX = os.environ.get("CXX", "c++")
BACKWARD_HEAD_DIMS = """#include "sm90/instances.h"
#include <cstdio>
int main() {
  for (int needed = 8; needed <= 256; needed += 8)
    std::printf("%d %d\\n", needed, hf_flash::sm90::backward_head_dim(needed));
}
"""


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs ``python -m hf_flash ARGUMENTS``; gives the exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf_flash", *arguments])
        code = command.main()
        return code, capsys.readouterr().out

    return run


def table(text: str, device: str) -> dict[str, list[str]]:
    """Cells of the feature table of a device, by feature."""
    rows = text.split(f"feature on {device}")[1].split("\n\n")[0].splitlines()[1:]
    return {row[:24].strip(): row[24:].split() for row in rows if not row.startswith("  ")}


def test_doctor_names_what_is_installed(call):
    code, text = call("doctor")
    assert code == 0
    for line in (f"torch         {torch.__version__.split('+')[0]}", "transformers", "CPU library   /"):
        assert line in text
    assert ops.LIBRARIES["cuda"] in text
    if not torch.cuda.is_available():
        assert "none that torch can see" in text


def test_every_feature_runs_on_the_cpu(call):
    cells = table(call("doctor")[1], "cpu")
    assert set(cells) == set(command._FEATURES)
    assert all(served == ["cpu"] * 4 for served in cells.values())


def test_doctor_asks_the_code(call, monkeypatch):
    """A feature that support.py refuses shows its code in the table and its sentence below."""
    honest = support.unsupported

    def without_softcap(q, k, v, softcap=0.0, **keywords):
        if softcap:
            return support.Unsupported("SOFTCAP", "this machine lost its tanh")
        return honest(q, k, v, softcap=softcap, **keywords)

    monkeypatch.setattr(support, "unsupported", without_softcap)
    text = call("doctor")[1]
    cells = table(text, "cpu")
    assert cells["softcap"] == ["SOFTCAP"] * 4
    assert cells["dropout"] == ["cpu"] * 4
    assert "  SOFTCAP: this machine lost its tanh" in text


@pytest.mark.parametrize("capability, forced", [((8, 0), ""), ((9, 0), ""), ((9, 0), "sm80"), ((12, 0), "")])
def test_kernels_are_named_as_dispatch_chooses(monkeypatch, capability, forced):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("HF_FLASH_ARCH", forced)
    want = "sm90" if capability == (9, 0) and not forced else "sm80"
    assert support.kernel_name(torch.device("cuda", 0)) == want
    assert support.kernel_name(torch.device("cpu")) == "cpu"


def test_kernels_forced_on_a_gpu_that_cannot_run_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setenv("HF_FLASH_ARCH", "sm90")
    assert support.kernel_name(torch.device("cuda", 0)) == "none"


def test_doctor_says_what_is_forced(call, monkeypatch):
    monkeypatch.delenv("HF_FLASH_ARCH", raising=False)
    assert "HF_FLASH_ARCH" not in call("doctor")[1]
    monkeypatch.setenv("HF_FLASH_ARCH", "sm80")
    assert "HF_FLASH_ARCH sm80" in call("doctor")[1]


def test_doctor_names_hoppers_kernels(call, monkeypatch):
    """For every head dimension; the CPU stands for a Hopper GPU."""
    choose = support.kernel_name
    monkeypatch.delenv("HF_FLASH_ARCH", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(support, "kernel_name", lambda device, *rest: choose(torch.device("cuda", 0), *rest))
    text = call("doctor")[1]
    cells = table(text, "cpu")
    assert cells["head dim 128"] == cells["head dim 256"] == cells["bias with gradient"] == ["sm90"] * 4


@pytest.mark.skipif(not CSRC.is_dir() or shutil.which(CXX) is None, reason="needs csrc/ and a C++ compiler")
def test_hopper_backward_is_what_the_kernels_say(tmp_path):
    """csrc/instances.py repeats backward_head_dim() of csrc/sm90/instances.h: each bucket is one file's."""
    (tmp_path / "cuda_runtime.h").write_text("#pragma once\nusing cudaStream_t = void*;\n")
    (tmp_path / "main.cpp").write_text(BACKWARD_HEAD_DIMS)
    subprocess.run(
        [CXX, "-std=c++17", f"-I{tmp_path}", f"-I{CSRC}", tmp_path / "main.cpp", "-o", tmp_path / "a"], check=True
    )
    served = {}
    for line in subprocess.run([tmp_path / "a"], capture_output=True, text=True, check=True).stdout.splitlines():
        needed, bucket = map(int, line.split())
        served[needed] = bucket
        assert needed <= bucket, line
    assert len(served) == 32
    sys.path.insert(0, str(CSRC))
    instances = importlib.import_module("instances")
    sys.path.remove(str(CSRC))
    compiled = {
        variant: [
            d
            for which in ("backward", "wide_backward")
            for d in instances.HEAD_DIMS
            if variant in instances._variants("sm90", which, d)
        ]
        for variant in instances.VARIANTS
    }
    assert compiled["plain"] == compiled["all"] == sorted(set(served.values()))
    assert compiled["dropout"] == compiled["linear"] == [64, 128]
    assert compiled["linear_dropout"] == [64]


def test_a_driver_too_old_for_the_build(monkeypatch):
    monkeypatch.setattr(ops, "cuda_versions", lambda: (13000, 12080))
    code, sentence = support.gpu_reason(0)
    assert code == "DRIVER"
    assert "runs CUDA 12.8" in sentence
    assert "built with CUDA 13.0" in sentence
    assert "580 or newer" in sentence


def test_a_gpu_too_old(monkeypatch):
    monkeypatch.setattr(ops, "cuda_versions", lambda: (13000, 13000))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    code, sentence = support.gpu_reason(0)
    assert code == "ARCH"
    assert "7.5" in sentence
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    assert support.gpu_reason(0) is None


def test_bench_outside_a_clone(call, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "__file__", str(tmp_path / "hf_flash/__main__.py"))
    code, text = call("bench")
    assert code == 1
    assert "run from a clone" in text


def test_bench_passes_its_arguments_on(call, monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    for name in ("benchmark_cpu.py", "benchmark_flash_attention.py"):
        (tmp_path / "benchmarks" / name).write_text("import sys; sys.exit(sys.argv[1:] != ['--quick', '7'])")
    monkeypatch.setattr(command, "__file__", str(tmp_path / "hf_flash/__main__.py"))
    assert call("bench", "--quick", "7")[0] == 0
    assert call("bench")[0] == 1


def test_explain_prints_the_report(call, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    code, text = call("explain", str(tmp_path))
    assert code == 0
    assert text.count("BertSelfAttention  patched") == 2  # a note may name the class, where a test before compiled it


def test_explain_without_a_model(call, tmp_path):
    code, text = call("explain", str(tmp_path / "nothing"))
    assert code == 1
    assert "cannot load a model from" in text


def test_unknown_arguments_are_not_ignored(call):
    with pytest.raises(SystemExit) as stopped:
        call("doctor", "--loud")
    assert stopped.value.code == 2
