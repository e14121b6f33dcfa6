"""Do the tests see faults? Each of planted_faults.py must turn its named test red, in a copy of the sources."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutation.planted_faults import FAULTS

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "c++")
SWITCH = 'extern "C" __attribute__((visibility("default"))) int hf_flash_fault;\n'

needs_sources = pytest.mark.skipif(
    not (ROOT / "csrc/cpu").is_dir() or shutil.which(CXX) is None, reason="needs csrc/ and a C++ compiler"
)


def plant(copy: Path) -> None:
    """Every fault into the copy, each behind its own number of the switch."""
    for number, fault in enumerate(FAULTS, start=1):
        path = copy / fault.file
        text = path.read_text()
        assert text.count(fault.original) == 1, (
            f"fault {fault.name!r}: {fault.original!r} stands {text.count(fault.original)} times in {fault.file}; "
            "bring planted_faults.py up to date"
        )
        test = "(hf_flash_fault == {})" if path.suffix != ".py" else '(os.environ.get("HF_FLASH_FAULT") == "{}")'
        path.write_text(text.replace(fault.original, fault.faulty.replace("FAULT", test.format(number))))
    for path in (copy / "hf_flash/ops.py", copy / "hf_flash/attention.py"):
        future = "from __future__ import annotations\n"
        path.write_text(path.read_text().replace(future, future + "import os\n", 1))
    header = copy / "csrc/params.h"
    header.write_text(header.read_text().replace("#pragma once\n", "#pragma once\n" + SWITCH, 1))
    source = copy / "csrc/cpu/attention.cpp"
    source.write_text(source.read_text() + "\nint hf_flash_fault = 0;\n")


def build(copy: Path) -> None:
    """The CPU library of the copy, quickly rather than fast."""
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    target_version = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-O1", "-DHF_FLASH_CPU", target_version]
    sources = [copy / "csrc/bindings.cpp", *sorted((copy / "csrc/cpu").glob("*.cpp"))]

    def compile(source):
        target = copy / f"{source.stem}.o"
        subprocess.run(
            [CXX, *flags, f"-I{copy}/csrc", "-isystem", f"{torch}/include", "-c", source, "-o", target], check=True
        )
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile, sources))
    link = ["-Wl,-z,defs", f"-L{torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    subprocess.run([CXX, "-shared", *objects, "-o", copy / "hf_flash/_cpu.abi3.so", *link], check=True)


@needs_sources
def test_every_fault_turns_its_test_red(tmp_path):
    for folder in ("csrc", "hf_flash"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    plant(tmp_path)
    build(tmp_path)
    runner = [sys.executable, str(Path(__file__).with_name("run_faults.py")), str(tmp_path), str(ROOT)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    done = subprocess.run(runner, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: result for name, result in results.items() if result != "caught"}
    assert not wrong and len(results) == len(FAULTS) >= 15, f"{wrong}\n{done.stdout[-3000:]}"
