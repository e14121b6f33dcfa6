"""The house's rules about files and imports, as functions from text to faults, so that tests can plant faults too."""

from __future__ import annotations

import ast
import re

# Layers of hf_flash: a module may import at load time only what its row names. Patches count as one layer.
# What is not listed (reference, version, ...) stands on torch alone.
MAY_IMPORT_TRANSFORMERS = {
    "backend",
    "masks",
    "patching",
    "judgement",
    "record",
    "trainer",
    "fallback",
    "registry",
    "padding_free",
    "patches",
}
ORDER = ["ops", "attention", "backend", "patching", "patches"]  # each may import what stands before it, never after

LONGEST_FILE = 400


def imported_modules(source: str, package: str = "hf_flash") -> set[str]:
    """Dotted names that a module imports while it is loaded; relative ones resolved against ``package``.

    Imports inside functions, and under ``if TYPE_CHECKING``, happen later or never and do not count.
    """
    found = set()
    todo: list[ast.AST] = list(ast.parse(source).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += list(ast.iter_child_nodes(node))
    return found


def import_faults(module: str, source: str) -> list[str]:
    """Faults in the imports of hf_flash's ``module`` ("ops", "backend", or "patches" for any file there)."""
    package = "hf_flash.patches" if module == "patches" else "hf_flash"
    imports = imported_modules(source, package)
    faults = []
    if module not in MAY_IMPORT_TRANSFORMERS:
        faults += [f"{module} imports {name}" for name in imports if name.split(".")[0] == "transformers"]
    own = {name.split(".")[1] for name in imports if name.startswith("hf_flash.")}
    if module == "reference":
        faults += [f"reference imports hf_flash.{name}; it stands on torch alone" for name in own]
    if module in ORDER:
        later = ORDER[ORDER.index(module) + 1 :]
        faults += [f"{module} imports hf_flash.{name}, which stands above it" for name in own & set(later)]
    return sorted(faults)


def include_faults(path: str, source: str) -> list[str]:
    """Faults in the includes of a file of csrc: ``path`` is relative to csrc."""
    includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source, re.MULTILINE)
    folder = path.split("/")[0]
    faults = []
    for name in includes:
        target = name.split("/")[0]
        if target in ("torch", "ATen", "c10") and not path.startswith("bindings"):
            faults.append(f"{path} includes {name}: only the bindings may include torch")
        if name.startswith("torch/") and not name.startswith(
            ("torch/csrc/stable", "torch/headeronly", "torch/csrc/inductor/aoti_torch/c/")
        ):
            faults.append(f"{path} includes {name}, which is not part of torch's stable ABI")
        if {folder, target} == {"sm80", "sm90"}:
            faults.append(f"{path} includes {name}: the architectures never include each other")
        if folder in ("attention", "tile", "instructions", "cpu") and target in ("sm80", "sm90"):
            faults.append(f"{path} includes {name}: {folder} knows no architecture")
        if target in ("cute", "cutlass"):
            faults.append(f"{path} includes {name}: the build asks for no CUTLASS")
        if folder == "cpu" and target in ("tile", "instructions", "cuda_runtime.h"):
            faults.append(f"{path} includes {name}: the CPU kernels need no CUDA")
    if folder != "instructions" and re.search(r"\basm\s*(volatile)?\s*\(", source):
        faults.append(f"{path} has asm: it belongs into instructions/")
    return faults


def size_faults(path: str, source: str) -> list[str]:
    lines = source.count("\n")
    return [f"{path} has {lines} lines, more than {LONGEST_FILE}"] if lines > LONGEST_FILE else []


def text_faults(path: str, source: str) -> list[str]:
    """Faults of any text file: ends of lines, and marks of an unfinished merge."""
    faults = []
    for number, line in enumerate(source.splitlines(), 1):
        if line.startswith(("<<<<<<< ", ">>>>>>> ")):
            faults.append(f"{path}:{number} is a mark of an unfinished merge")
        if line != line.rstrip() and not path.endswith(".md"):
            faults.append(f"{path}:{number} ends in spaces")
    if source and not source.endswith("\n"):
        faults.append(f"{path} does not end with a new line")
    return faults
