"""The wheel: its tag and content, what its libraries need, and a patched model in a venv that has only the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

PATCHED_FORWARD = """
import copy, pathlib, sys
import torch
from transformers import BertConfig, BertModel
import hf_flash

assert pathlib.Path(hf_flash.__file__).is_relative_to(sys.prefix), hf_flash.__file__
torch.manual_seed(0)
config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
config._attn_implementation = "eager"
eager = BertModel(config).eval()
ours = hf_flash.patch_model(copy.deepcopy(eager))
ids = torch.randint(64, (2, 21))
mask = torch.ones_like(ids)
mask[1, 13:] = 0
with torch.no_grad():
    error = (eager(ids, mask)[0] - ours(ids, mask)[0])[mask.bool()].abs().max().item()
assert error < 1e-5, error
assert hf_flash.explain(ours).share == 1.0, hf_flash.explain(ours)
print("served", sum(row.served for row in hf_flash.explain(ours).rows), "from", hf_flash.__file__)
"""


def run(*command, cwd=ROOT, **environment) -> str:
    """Output of a command; its own words when it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this tree; ninja compiles only what the last build did not."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def libraries(wheel, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("libraries")
    with zipfile.ZipFile(wheel) as archive:
        return [Path(archive.extract(name, folder)) for name in archive.namelist() if name.endswith(".so")]


def test_wheel_serves_every_python(wheel):
    assert re.fullmatch(r"hf_flash-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = next(name for name in names if name.endswith("METADATA")).removesuffix("METADATA")
    expected = {f"hf_flash/{p.name}" for p in (ROOT / "hf_flash").glob("*.py")}
    expected |= {f"hf_flash/patches/{p.name}" for p in (ROOT / "patches").glob("*.py")}
    built = {"hf_flash/_cpu.abi3.so"}
    if (ROOT / "hf_flash/_cuda.abi3.so").exists():
        built.add("hf_flash/_cuda.abi3.so")
    assert {name for name in names if not name.startswith(info)} == expected | built
    assert f"{info}licenses/LICENSE" in names


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
def test_libraries_need_torch_and_the_system_only(libraries):
    allowed = {"libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    allowed |= {"libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    for library in libraries:
        needed = set(re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", library)))
        assert {"libtorch.so", "libtorch_cpu.so"} <= needed <= allowed


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_libraries_use_the_stable_abi_alone(libraries):
    """No symbol of Python, of torch's C++ classes, or of the CUDA driver."""
    for library in libraries:
        undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()]
        assert any(name.startswith("aoti_torch_") for name in undefined)
        foreign = [n for n in undefined if re.match(r"_?Py[A-Z_]|_ZN?K?\d*(2at|3c10|5torch)|cu[A-Z]|cuda[A-Z]", n)]
        assert foreign == []


def test_patched_model_in_an_empty_venv(wheel, tmp_path):
    """Everything but hf_flash comes from here through a .pth file; that leaves this clone's editable install out."""
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(shared))
    printed = run(python, "-c", PATCHED_FORWARD, cwd=tmp_path, PYTHONPATH="")
    assert printed.startswith("served 2 from ")


def test_source_distribution_is_complete(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    tracked = [name for name in listed.stdout.split() if (ROOT / name).is_file()]
    tree = tmp_path / "tree"
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=tree, HF_FLASH_CUDA="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    run("tar", "xzf", archive, cwd=tmp_path)
    (folder,) = (path for path in tmp_path.glob("hf_flash-*") if path.is_dir())
    wanted = {n for n in tracked if n.startswith(("csrc/", "hf_flash/", "patches/"))} | {"setup.py", "pyproject.toml"}
    assert sorted(name for name in wanted if not (folder / name).exists()) == []


def decision(**environment) -> tuple[int, str]:
    """What setup.py says and its exit code; ``--version`` asks it to decide and to build nothing."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"HF_FLASH_CUDA": ""} | environment,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_build_says_what_it_decided(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch(mode=0o755)
    code, said = decision(CUDA_HOME=str(tmp_path))
    assert code == 0
    assert f"building with CUDA: nvcc is {tmp_path}/bin/nvcc" in said
    code, said = decision(CUDA_HOME=str(tmp_path), HF_FLASH_CUDA="0")
    assert code == 0
    assert "building without CUDA: HF_FLASH_CUDA=0" in said
    code, said = decision(HF_FLASH_CUDA="yes")
    assert code != 0
    assert "HF_FLASH_CUDA is 'yes'; it must be 0" in said


def test_libraries_load_without_a_driver():
    """On a machine without a GPU the CUDA library loads where torch has CUDA, and is left alone where it has not."""
    from hf_flash import ops

    assert ops.LIBRARIES["cpu"].endswith("_cpu.abi3.so")
    if torch.version.cuda is None:
        assert ops.LIBRARIES["cuda"].startswith("not loaded: this torch was built without CUDA")
    elif (ROOT / "hf_flash/_cuda.abi3.so").exists():
        assert ops.LIBRARIES["cuda"].endswith("_cuda.abi3.so")
        assert ops.has_kernel("row_sum", "cuda")
    else:
        assert "hf_flash was built without CUDA" in ops.LIBRARIES["cuda"]


def test_libraries_of_another_version_are_refused(monkeypatch):
    """They would take an argument for its neighbour, as both are positions alone."""
    from hf_flash import ops

    swapped = namedtuple("Numbers", ("scale", "window_left", "heads_first", *ops.Numbers._fields[3:]))
    monkeypatch.setattr(ops, "Numbers", swapped)
    with pytest.raises(ImportError, match=r"another version.*pip install"):
        ops._compare_schemas()
