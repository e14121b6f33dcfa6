"""What ran where: calls counted for each attention module, reasons for the rest, and the table that people read.

Reasons are codes that stay the same from release to release, each with a sentence that says what to do.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .support import Unsupported

logger = logging.getLogger("hf_flash")

RECORD = "_hf_flash"  # name under which patch_model leaves its record in a module's __dict__
ASKED_FOR = ("DISABLED", "EXCLUDED")  # reasons that the user gave; never a warning, nor an error


@dataclass
class Calls:
    """How one module's attention calls were served. ``fallbacks``: code -> number; ``reasons``: code -> sentence."""

    served: int = 0
    fallbacks: Counter = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)


_CALLS: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()
_WARNED: set[tuple[str, str]] = set()


def calls_of(module: nn.Module) -> Calls:
    """A module's count; a patched one's is in its record, which the replicas of nn.DataParallel share with it."""
    record = module.__dict__.get(RECORD)
    calls = _CALLS.get(module) if record is None or record.calls is None else record.calls
    return _CALLS.setdefault(module, Calls()) if calls is None else calls


def keep(module: nn.Module, calls: Calls) -> None:
    """Go on counting from here."""
    _CALLS[module] = calls


def forget(module: nn.Module) -> None:
    """Start counting anew."""
    _CALLS.pop(module, None)


def count_served(module: nn.Module) -> None:
    if torch.compiler.is_compiling():  # a counter in a compiled graph would make it recompile on every call
        _note_compiled(type(module).__name__, "served")
    else:
        calls_of(module).served += 1


_COMPILED: set[tuple[str, str]] = set()  # (attention class, "served" or a reason's code), noted while tracing


@torch.compiler.assume_constant_result
def _note_compiled(name: str, what: str) -> bool:
    _COMPILED.add((name, what))
    return True


def compiled_notes(names: set[str]) -> list[str]:
    """What was traced by torch.compile in this process, for these attention classes."""
    return [
        f"{name} was compiled: {'served' if what == 'served' else f'fallback [{what}]'}; compiled calls are not counted"
        for name, what in sorted(_COMPILED)
        if name in names
    ]


def strict() -> bool:
    return os.environ.get("HF_FLASH_STRICT", "0") == "1"


def disabled() -> bool:
    return os.environ.get("HF_FLASH_DISABLE", "0") == "1"


def note_fallback(module: nn.Module, reason: Unsupported, on_fallback: str) -> None:
    """Count a call that our kernel does not serve; one log line for each class and code, or an error if so asked."""
    name = type(module).__name__
    if (on_fallback == "error" or strict()) and reason.code not in ASKED_FOR:
        raise reason.error(
            f"hf_flash [{reason.code}] in {name}: {reason.sentence} (an error because on_fallback='error' or "
            "HF_FLASH_STRICT=1)"
        )
    if torch.compiler.is_compiling():
        _note_compiled(name, reason.code)
        _warn(name, reason.code, reason.sentence, on_fallback)
        return
    calls = calls_of(module)
    calls.fallbacks[reason.code] += 1
    calls.reasons[reason.code] = reason.sentence
    _warn(name, reason.code, reason.sentence, on_fallback)


@torch.compiler.assume_constant_result
def _warn(name: str, code: str, sentence: str, on_fallback: str) -> bool:
    if on_fallback == "warn" and code not in ASKED_FOR and (name, code) not in _WARNED:
        _WARNED.add((name, code))
        logger.warning("%s falls back to Transformers' own attention [%s]: %s", name, code, sentence)
    return True


@dataclass
class Row:
    """One attention module. status: "patched", "fallback" (patched, but calls fell back) or "skipped"."""

    name: str
    attention: str
    status: str
    code: str = ""
    sentence: str = ""
    served: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass
class Report:
    """What ``explain`` returns; print it. ``rows``: one for each attention module; ``notes``: about the machine."""

    model: str
    rows: list[Row]
    kernel: str
    notes: list[str] = field(default_factory=list)

    @property
    def served(self) -> int:
        return sum(row.served for row in self.rows)

    @property
    def calls(self) -> int:
        return self.served + sum(sum(row.fallbacks.values()) for row in self.rows)

    @property
    def share(self) -> float | None:
        """Share of attention calls that our kernel served so far; None before the first call."""
        return self.served / self.calls if self.calls else None

    def reasons(self) -> dict[str, str]:
        """code -> sentence, over all modules."""
        return {row.code: row.sentence for row in self.rows if row.code}

    def __str__(self) -> str:
        count = Counter(row.status for row in self.rows)
        states = ", ".join(f"{number} {status}" for status, number in sorted(count.items())) or "no attention found"
        share = "no call yet" if self.share is None else f"{self.share:.1%} of {self.calls} attention calls served"
        lines = [f"hf_flash: {self.model}: {states}; {share}; {self.kernel}"]
        width = max((len(row.name) for row in self.rows), default=0)
        for row in self.rows:
            fell = ", ".join(f"{code} x{number}" for code, number in row.fallbacks.items())
            detail = ", ".join(filter(None, [f"{row.served} served", fell])) if row.served or fell else row.code
            lines.append(f"  {row.name:<{width}}  {row.attention}  {row.status}  {detail}".rstrip())
        lines += [f"  [{code}] {sentence}" for code, sentence in self.reasons().items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
