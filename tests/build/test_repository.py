"""The repository keeps its own rules: sizes, directions of imports and includes, links, lists that must agree."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load(path: Path):
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rules = load(Path(__file__).parent / "rules.py")


def tracked(*suffixes: str) -> dict[str, str]:
    """Text of the tracked files with these suffixes by path; of all that lie here where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\0") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    paths = [name for name in names if name.endswith(suffixes) and (ROOT / name).is_file()]
    assert paths, f"no file ends in {suffixes}"
    return {path: (ROOT / path).read_text() for path in paths}


CODE = (".py", ".h", ".cpp", ".cu", ".cuh", ".sh", ".toml", "Makefile", ".ci/run")


def faults_in(files: dict[str, str], rule) -> list[str]:
    return [fault for path, source in files.items() for fault in rule(path, source)]


def test_files_are_short():
    assert faults_in(tracked(*CODE), rules.size_faults) == []


def test_text_is_clean():
    assert faults_in(tracked(*CODE, ".md"), rules.text_faults) == []


def test_setup_stays_small():
    assert (ROOT / "setup.py").read_text().count("\n") <= 160


def test_imports_point_one_way():
    files = {path: text for path, text in tracked(".py").items() if path.startswith(("hf_flash/", "patches/"))}
    faults = []
    for path, source in files.items():
        module = "patches" if path.startswith("patches/") else Path(path).stem
        faults += rules.import_faults(module, source)
    assert faults == []


def test_includes_point_one_way():
    files = {path.removeprefix("csrc/"): text for path, text in tracked(".h", ".cpp", ".cu", ".cuh").items()}
    assert faults_in(files, rules.include_faults) == []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        ("include_faults", "sm80/forward.cuh", '#include "sm90/config.h"\n'),
        ("include_faults", "attention/score.cuh", '#include "sm80/config.h"\n'),
        ("include_faults", "cpu/forward.cpp", "#include <torch/csrc/stable/tensor.h>\n"),
        ("include_faults", "bindings.h", "#include <torch/extension.h>\n"),
        ("include_faults", "cpu/forward.cpp", '#include "tile/matmul.cuh"\n'),
        ("include_faults", "sm90/forward.cuh", "#include <cute/arch/mma_sm90.hpp>\n"),
        ("include_faults", "sm80/forward.cuh", 'asm volatile("mma.sync");\n'),
        ("import_faults", "ops", "from . import backend\n"),
        ("import_faults", "ops", "from .backend import register\n"),
        ("import_faults", "attention", "import hf_flash.patching\n"),
        ("import_faults", "attention", "try:\n    import transformers.modeling_utils\nexcept ImportError:\n    pass\n"),
        ("import_faults", "reference", "from .support import unsupported\n"),
        ("import_faults", "backend", "from .patches import encoder\n"),
        ("size_faults", "a.py", "x = 1\n" * 401),
        ("text_faults", "a.py", "x = 1 \n"),
        ("text_faults", "a.py", "x = 1"),
    ],
)
def test_rules_find_planted_faults(rule, path, source):
    assert len(getattr(rules, rule)(path, source)) == 1


def test_rules_allow_what_is_meant():
    lazy = "def explain():\n    from transformers import AutoModel\n    return AutoModel\n"
    assert rules.import_faults("__main__", lazy) == []
    assert rules.import_faults("patches", "from ..backend import rule\nimport transformers\n") == []
    assert rules.include_faults("sm80/forward.cuh", '#include "attention/score.cuh"\n#include "tile/copy.cuh"\n') == []
    assert rules.include_faults("bindings.cpp", "#include <torch/csrc/stable/library.h>\n") == []


def test_nothing_built_or_large_is_tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    names = listed.stdout.split()
    assert [n for n in names if n.endswith((".so", ".o", ".whl", ".pyc")) or "/instances/" in n] == []
    assert [n for n in names if (ROOT / n).is_file() and (ROOT / n).stat().st_size > 2**20] == []


def test_makefile_installs_what_the_build_requires():
    project = (ROOT / "pyproject.toml").read_text()
    required = re.findall(r'"([^"]+)"', re.search(r"^requires = \[(.*)\]", project, re.MULTILINE)[1])
    makefile = re.search(r"^BUILD_REQUIRES := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert set(required) == set(makefile.replace("'", "").split())


def test_documented_commands_exist():
    help_text = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([a-z-]+) ", help_text, re.MULTILINE))
    assert {"demo", "test", "build", "lint", "format", "gpu-test", "bench", "wheel"} <= targets
    documents = tracked(".md")
    used = {(path, name) for path, text in documents.items() for name in re.findall(r"`make ([a-z-]+)", text)}
    assert used, "the documents name no command at all"
    assert [f"{path}: make {name}" for path, name in sorted(used) if name not in targets] == []


def test_links_between_documents_exist():
    broken = []
    for path, text in tracked(".md").items():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target and not ((ROOT / path).parent / target).exists():
                broken.append(f"{path} -> {target}")
    assert broken == []


def test_changelog_has_this_version():
    version = re.search(r'"([^"]+)"', (ROOT / "hf_flash/version.py").read_text().split("__version__ =")[1])[1]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
