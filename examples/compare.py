"""What finetune_bert_long.py holds against eager attention: training steps, and time and memory by length."""

from __future__ import annotations

from pathlib import Path

import numpy
from common import mixed_precision
from measure import measure

FLOAT32_LOSS_LIMIT = 1e-3  # largest relative difference of a loss against eager over the first 10 steps
HALF_STEP = 2.0**-8  # bfloat16's rounding step: the least that half precision is allowed


def verdict(what: str, value: float, limit: float) -> bool:
    """Prints whether `value` is within `limit`; NaN is not."""
    passed = value <= limit
    print(f"{'ok  ' if passed else 'FAIL'} {what} (limit {limit:.1e})", flush=True)
    return passed


def loss_distance(losses: list[float], exact: list[float]) -> float:
    """The largest relative difference over the first 10 steps; NaN where a loss is NaN."""
    ours, theirs = numpy.array(losses[:10]), numpy.array(exact[:10])
    return float(numpy.max(abs(ours - theirs) / abs(theirs)))


def compare_steps(options, spec: dict, folder: Path) -> bool:
    """The same steps with each attention, same seed, dropout 0, each in its own process: losses, time, memory.

    In half precision every attention is held against eager in float32, and hf_flash may be twice as far from it as
    eager in half precision is.
    """
    precision = mixed_precision() or "float32"
    steps, batch = options.compare_steps, options.compare_batch_size
    spec = {**spec, "task": "steps", "steps": steps, "batch": batch, "precision": precision}
    print(f"\n{steps} steps of {batch} windows, dropout 0, {precision}, each attention in its own process", flush=True)
    rows = {name: measure({**spec, "attention": name}, folder) for name in ("hf_flash", *options.compare)}
    exact, limit, against = rows["eager"]["losses"], FLOAT32_LOSS_LIMIT, "eager"
    if precision != "float32":
        exact = measure({**spec, "attention": "eager", "precision": "float32"}, folder)["losses"]
        limit = max(2 * loss_distance(rows["eager"]["losses"], exact), HALF_STEP)
        against = "eager in float32"
    print("  attention    step time  peak memory   above rest   first and last loss")
    for name, row in rows.items():
        print(f"  {name:10} {row['step_seconds']:9.3f} s {row['peak_mib']:8.0f} MiB", end="")
        print(f" {row['peak_mib'] - row['rest_mib']:8.0f} MiB   {row['losses'][0]:.5f} {row['losses'][-1]:.5f}")
    difference = loss_distance(rows["hf_flash"]["losses"], exact)
    return verdict(f"losses against {against}: largest relative difference {difference:.1e}", difference, limit)


def compare_lengths(options, spec: dict, folder: Path) -> dict:
    """Forward + backward at each length with each attention, each in its own process; prints and returns a table."""
    precision = mixed_precision() or "float32"
    spec = {**spec, "task": "lengths", "lengths": options.lengths, "batch": options.passes, "precision": precision}
    print(f"\nforward + backward by length with dropout, {precision}, batch {options.passes}", flush=True)
    rows = {name: measure({**spec, "attention": name}, folder) for name in ("hf_flash", *options.compare)}
    print("  tokens" + "".join(f"{name + ' time':>18}{name + ' peak':>16}" for name in rows))
    for number, length in enumerate(sorted(options.lengths)):
        cells = ""
        for row in rows.values():
            if number < len(row["lengths"]):
                cells += f"{row['seconds'][number]:16.3f} s{row['peak_mib'][number]:12.0f} MiB"
            else:
                cells += f"{'out of memory':>34}"
        print(f"  {length:6}{cells}", flush=True)
    return rows
