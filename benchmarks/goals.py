"""The speeds that this project holds itself to on an H100, and whether measured rows meet them.

Each goal compares our time in a cell with the fastest of some peers in that cell, or our rate with that of a plain cell
of ours, or is a rate. ``floor`` is what must be, ``aim`` what is hoped for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

FLASH, EFFICIENT, CUDNN = "flash (torch)", "mem-efficient (torch)", "cuDNN (torch)"
BEST = (CUDNN, "flash-attn 3", "flash-attn 4")
EVERY = (FLASH, EFFICIENT, *BEST)


@dataclass(frozen=True)
class Goal:
    """words: what is compared, for the heading. what: "forward", "backward", "both", or "memory".

    against: peers, of which the fastest counts; or "plain": our plain cell that ran in turns with it, by rate; or
    "rate": nothing, the floor is in TFLOP/s. cells: which rows it is about. mean: the floor of the geometric mean.
    """

    words: str
    section: str
    what: str
    against: tuple[str, ...] | str
    floor: float
    aim: float | None = None
    mean: float | None = None
    cells: Callable[[dict], bool] = lambda row: True
    ours: str = "hf_flash"


class Verdict(NamedTuple):
    """One cell of a goal: ratio to the fastest peer (or the rate), None where something was not measured."""

    cell: str
    ours: float | None
    best: float | None
    name: str
    ratio: float | None

    def met(self, floor: float) -> bool | None:
        return None if self.ratio is None else self.ratio >= floor


def has(term: str) -> Callable[[dict], bool]:
    return lambda row: term in row["variant"].split("+")


def plain(row: dict) -> bool:
    return row["variant"] in ("plain", "causal")


def long(row: dict) -> bool:
    return row["S"] >= 1024


def both(*tests: Callable[[dict], bool]) -> Callable[[dict], bool]:
    return lambda row: all(test(row) for test in tests)


def head_dim(d: int) -> Callable[[dict], bool]:
    return lambda row: row["D"] == d


HOPPER = (
    Goal("16k tokens, against the best of cuDNN, FlashAttention 3 and 4", "peers", "forward", BEST, 0.95, 1.05, 1.0),
    Goal("16k tokens, against the best of cuDNN, FlashAttention 3 and 4", "peers", "backward", BEST, 0.95, 1.08, 1.0),
    Goal("shared heads, against cuDNN, FlashAttention 3 and 4", "grouped", "forward", BEST, 0.95, 1.05, 1.0),
    Goal("shared heads, against cuDNN, FlashAttention 3 and 4", "grouped", "backward", BEST, 0.95, 1.08, 1.0),
    Goal("D 256", "d256", "forward", "rate", 600, 750, cells=lambda row: not row["causal"]),
    Goal("D 256, causal", "d256", "forward", "rate", 540, 640, cells=lambda row: row["causal"]),
    Goal("D 256", "d256", "backward", "rate", 400, 500),
    Goal(
        "short, in a CUDA graph, D 64, against the best of FlashAttention 2 and cuDNN",
        "short", "forward", (FLASH, CUDNN), 1.0, 1.3, cells=lambda row: row["S"] <= 384 and row["D"] == 64,
    ),
    Goal("short, in a CUDA graph, against the best peer", "short", "backward", EVERY, 1.1, 1.5),
    Goal("dropout, D 128", "extras", "forward", "plain", 0.80, 0.90, cells=both(has("dropout"), head_dim(128))),
    Goal("dropout, D 64", "extras", "forward", "plain", 0.70, 0.85, cells=both(has("dropout"), head_dim(64))),
    Goal("dropout", "extras", "backward", "plain", 0.80, 0.90, cells=has("dropout")),
    Goal("bias without gradient", "extras", "forward", "plain", 0.6, 0.8, cells=has("fixed bias")),
    Goal("bias with gradient", "extras", "forward", "plain", 0.6, 0.8, cells=has("bias")),
    Goal("ALiBi", "extras", "forward", "plain", 0.6, 0.8, cells=has("alibi")),
    Goal("deterministic", "extras", "backward", "plain", 0.85, 0.95, cells=has("deterministic")),
    Goal(
        "bias gradient, B8 H12 D64 S2048", "bias", "backward", "plain", 0.5, 0.7,
        cells=lambda row: row["S"] == 2048 and row["variant"] == "bias",
    ),
    Goal("packed batch of ragged lengths, rate against S 2048", "packed", "forward", "plain", 0.8, 0.95,
         cells=has("packed")),
    Goal("padding + dropout, against cuDNN", "padding", "forward", (CUDNN,), 3.0, 4.5, cells=long),
    Goal("padding + dropout, against cuDNN", "padding", "backward", (CUDNN,), 2.0, 3.0, cells=long),
    Goal(
        "padding + dropout, against scaled_dot_product_attention as it dispatches",
        "padding", "both", ("sdpa (dispatch)",), 2.3, 3.4, cells=long,
    ),
)  # fmt: skip


def _every_gpu(ours: str, plain_section: str, dropout: str, padding: str, bias: str) -> tuple[Goal, ...]:
    """What the kernels of mma.sync promise on any GPU, for the kernels and sections named."""
    return (
        Goal("16k tokens, against PyTorch's flash", plain_section, "forward", (FLASH,), 0.98, None, 1.03, plain, ours),
        Goal("16k tokens, against PyTorch's flash", plain_section, "backward", (FLASH,), 0.98, None, 1.03, plain, ours),
        Goal("extra memory against PyTorch's flash", plain_section, "memory", (FLASH,), 0.995, None, None, plain, ours),
        Goal(
            "dropout, against PyTorch's flash", dropout, "both", (FLASH,), 1.1, ours=ours,
            cells=lambda row: row["variant"].startswith("dropout") and "padding" not in row["variant"],
        ),
        Goal("padding + dropout, against memory-efficient", padding, "both", (EFFICIENT,), 4.0, ours=ours,
             cells=both(long, has("padding"))),
        Goal("padding + dropout, against cuDNN", padding, "both", (CUDNN,), 1.8, ours=ours,
             cells=both(long, has("padding"))),
        Goal("bias with gradient, against memory-efficient", bias, "both", (EFFICIENT,), 2.0, ours=ours,
             cells=has("bias")),
    )  # fmt: skip


EVERY_GPU = _every_gpu("hf_flash", "peers", "dropout", "padding", "bias")
SM80 = _every_gpu("hf_flash sm80", "arch", "arch", "arch", "arch")
GOALS = HOPPER + EVERY_GPU + SM80
HOST_MICROSECONDS = {"fwd_us": 20, "both_us": 40}  # host time of one small call beyond scaled_dot_product_attention's


def cell_of(row: dict) -> tuple:
    return row["section"], row["variant"], row["dtype"], row["B"], row["S"], row["H"], row["D"]


def value(row: dict, what: str) -> float:
    """Milliseconds, or MiB: less is better."""
    if what == "memory":
        return max(row["peak_mib"], 1e-9)
    return {"forward": row["fwd_ms"], "backward": row["bwd_ms"], "both": row["fwd_ms"] + row["bwd_ms"]}[what]


def rate(row: dict, what: str) -> float:
    return row["fwd_tflops" if what == "forward" else "bwd_tflops"]


def judge(goal: Goal, rows: Iterable[dict]) -> list[Verdict]:
    """One verdict for each cell of ours that the goal is about."""
    rows = [row for row in rows if row["section"] == goal.section and "fwd_ms" in row]
    mine = [row for row in rows if row["peer"] == goal.ours]
    verdicts = []
    for row in filter(goal.cells, mine):
        where = f"D{row['D']} S{row['S']} {row['variant']}"
        if goal.against == "rate":
            found = rate(row, goal.what)
            verdicts.append(Verdict(where, found, None, "TFLOP/s", found))
        elif goal.against == "plain":
            same = [r for r in rows if r["peer"] == f"{goal.ours} plain" and cell_of(r) == cell_of(row)]
            best = rate(same[0], goal.what) if same else None
            found = rate(row, goal.what)
            verdicts.append(Verdict(where, found, best, "plain", found / best if best else None))
        else:
            others = [r for r in rows if cell_of(r) == cell_of(row) and r["peer"] in goal.against]
            best = min(others, key=lambda r: value(r, goal.what), default=None)
            found = value(row, goal.what)
            known = (value(best, goal.what), best["peer"]) if best else (None, "none measured")
            verdicts.append(Verdict(where, found, *known, known[0] / found if best else None))
    return verdicts


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(math.log(max(ratio, 1e-9)) for ratio in ratios) / len(ratios))
