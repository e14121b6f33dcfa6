"""The check of the CUDA build finds what it must: spills, missing targets, warnings, files that were not compiled."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("check_cuda_build", Path(__file__).parent / "check_cuda_build.py")
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)


def entry(name="_Z7forwardv", target="sm_80", spilled=0) -> str:
    """ptxas's words about one kernel."""
    return (
        f"ptxas info    : Compiling entry function '{name}' for '{target}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    0 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 400 bytes cmem[0]\n"
    )


def test_good_log():
    kernels, faults = check.faults_of("a", "nvcc", entry() + entry(target="sm_90"))
    assert faults == []
    assert [(k.target, k.spilled, k.registers) for k in kernels] == [("sm_80", 0, 168), ("sm_90", 0, 168)]


@pytest.mark.parametrize(
    ("rule", "log", "word"),
    [
        ("nvcc", entry(spilled=8) + entry(target="sm_90"), "16 bytes spilled by _Z7forwardv"),
        ("nvcc", entry(), "kernels for ['sm_80'], expected ['sm_80', 'sm_90']"),
        ("nvcc_sm90", entry(target="sm_90"), "expected ['sm_90a']"),
        ("nvcc", "a.cu(3): warning #177-D: variable was declared but never referenced\n", "warning #177-D"),
        ("nvcc_sm90", "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored\n", "setmaxnreg"),
    ],
)
def test_faults_are_found(rule, log, word):
    _, faults = check.faults_of("a", rule, log)
    assert len(faults) == 1
    assert word in faults[0]


def test_a_file_that_was_not_compiled_fails(tmp_path, capsys):
    (tmp_path / "build.ninja").write_text(f"build {tmp_path}/a_nvcc.o: nvcc /src/a.cu\n")
    (tmp_path / "_cuda.abi3.so").touch()
    assert check.main(tmp_path) == 1
    assert "a_nvcc.o was not compiled" in capsys.readouterr().out


def test_no_build_fails(tmp_path, capsys):
    assert check.main(tmp_path) == 1
    assert "make build" in capsys.readouterr().out
