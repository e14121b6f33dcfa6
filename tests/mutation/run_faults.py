"""Runs in a process of its own, beside a copy of hf_flash with the faults in it: ``python run_faults.py COPY ROOT``.

Switches one fault on after the other and runs its test; prints {fault's name: "caught", "survived"} as JSON last.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import pytest


def main(copy: Path, root: Path) -> None:
    sys.path.insert(0, str(copy))
    sys.path.insert(0, str(root / "tests"))
    from mutation.planted_faults import FAULTS

    import hf_flash

    assert Path(hf_flash.__file__).is_relative_to(copy), f"{hf_flash.__file__} is not the copy in {copy}"
    switch = ctypes.c_int.in_dll(ctypes.CDLL(hf_flash.ops.LIBRARIES["cpu"]), "hf_flash_fault")

    def run(fault: int, tests: list[str]) -> bool:
        switch.value = fault
        os.environ["HF_FLASH_FAULT"] = str(fault)
        quiet = ["-q", "-q", "-x", "--no-header", "--no-summary", "--tb=line", "-p", "no:cacheprovider"]
        return pytest.main([*quiet, "--rootdir", str(root), *(str(root / test) for test in tests)])

    results = {}
    if run(0, sorted({fault.test for fault in FAULTS})) != pytest.ExitCode.OK:
        results["no fault at all"] = "its tests fail"
    for number, fault in enumerate(FAULTS, start=1):
        code = run(number, [fault.test])
        results[fault.name] = {pytest.ExitCode.TESTS_FAILED: "caught", pytest.ExitCode.OK: "survived"}.get(
            code, str(code)
        )
    print()
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
