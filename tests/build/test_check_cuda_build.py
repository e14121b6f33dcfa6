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
        ("nvcc_sm90", "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async is serialized\n", "C7510"),
        ("nvcc_sm90", "setmaxnreg ignored; unable to determine register count at entry\n", "setmaxnreg ignored"),
        ("nvcc_sm90", entry(target="sm_90a", spilled=4), "8 bytes spilled"),
    ],
)
def test_faults_are_found(rule, log, word):
    _, faults = check.faults_of("a", rule, log)
    assert len(faults) == 1
    assert word in faults[0]


def sass(**kernels) -> str:
    """What cuobjdump -sass prints of kernels with these instructions."""
    head = "\nFatbin elf code:\n================\narch = sm_90a\n\n\tcode for sm_90a\n"
    text = "".join(
        f'\t\tFunction : {name}\n\t.headerflags\t@"EF_CUDA_SM90"\n        /*0000*/   {instruction} ;\n'
        for name, instruction in kernels.items()
    )
    return head + text


def test_hopper_files_must_multiply_by_wgmma():
    good = sass(_Z3pre="LDG.E R2, [R4]", _Z7forward="HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0")
    assert check.wgmma_faults("sm90_forward", good) == []
    (fault,) = check.wgmma_faults("sm90_forward", sass(_Z7forward="HMMA.16816.F32 R4, R8, R12, R4"))
    assert "sm90_forward: no HGMMA in the machine code of _Z7forward" in fault
    guarded = good.replace("HGMMA.64x128x16", "@!P1 REDUX.OR UR48, R4 ; HGMMA.64x128x16")
    (fault,) = check.wgmma_faults("sm90_forward", guarded)
    assert "a reduction under a predicate in _Z7forward" in fault
    (fault,) = check.wgmma_faults("sm90_forward", "cuobjdump info : no device code\n")
    assert "no function" in fault


def test_hopper_files_are_read(tmp_path, monkeypatch):
    """Only files of Hopper's rule are disassembled, and a missing tool is a fault."""
    read = []
    monkeypatch.setattr(check, "find_tool", lambda name: f"/bin/{name}")
    monkeypatch.setattr(check, "disassembled", lambda tools, target: read.append(target) or sass(_Z1a="HMMA R4"))
    (fault,) = check.hopper_faults(["sm90_a_nvcc_sm90.o"])
    assert read == ["sm90_a_nvcc_sm90.o"] and "sm90_a_nvcc_sm90: no HGMMA" in fault
    monkeypatch.setattr(check, "find_tool", lambda name: None)
    assert "nvidia-cuda-nvdisasm" in check.hopper_faults(["a.o"])[0] and check.hopper_faults([]) == []


def test_a_file_that_was_not_compiled_fails(tmp_path, capsys):
    (tmp_path / "build.ninja").write_text(f"build {tmp_path}/a_nvcc.o: nvcc /src/a.cu\n")
    (tmp_path / "_cuda.abi3.so").touch()
    assert check.main(tmp_path) == 1
    assert "a_nvcc.o was not compiled" in capsys.readouterr().out


def test_no_build_fails(tmp_path, capsys):
    assert check.main(tmp_path) == 1
    assert "make build" in capsys.readouterr().out
