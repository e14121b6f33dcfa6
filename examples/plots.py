"""The picture of finetune_bert_long.py: loss, time and memory against sequence length."""

from __future__ import annotations

from pathlib import Path

COLOURS = {"hf_flash": "#0b6e4f", "eager": "#c8553d", "sdpa": "#3d5a80"}


def draw(
    path: Path,
    losses: list[tuple[int, float]],
    held_out: list[tuple[int, float]],
    lengths: dict,
    what: str,
    memory: str,
):
    """Writes a PNG of three panels.

    losses and held_out: (step, loss) of the training run. lengths: attention -> what measure_lengths gave. what: the
    words for one measured pass. memory: the words for the memory axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.6), dpi=120, layout="constrained")
    left.plot(
        *zip(*losses, strict=True), color=COLOURS["hf_flash"], linewidth=1.5, marker="o", markersize=3, label="training"
    )
    left.plot(*zip(*held_out, strict=True), color="black", linestyle="--", marker="s", label="held out")
    left.set(title="Loss, trained with hf_flash", xlabel="step", ylabel="cross-entropy (nats)")
    for attention, row in lengths.items():
        style = {"color": COLOURS.get(attention, "grey"), "marker": "o", "label": attention}
        middle.plot(row["lengths"], row["seconds"], **style)
        right.plot(row["lengths"], [mib / 1024 for mib in row["peak_mib"]], **style)
    middle.set(title=f"Time, {what}", xlabel="sequence length (tokens)", ylabel="seconds")
    right.set(title=f"Peak memory, {what}", xlabel="sequence length (tokens)", ylabel=f"{memory} (GiB)")
    every = sorted({length for row in lengths.values() for length in row["lengths"]})
    for axis in (middle, right):
        axis.set_xticks(every, [str(length) for length in every])
        axis.set_xlim(left=0)
    for axis in (left, middle, right):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)
