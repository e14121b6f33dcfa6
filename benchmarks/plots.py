"""Speed-up and memory saving against standard attention by sequence length."""

from __future__ import annotations

from pathlib import Path

VARIANTS = ("plain", "causal", "dropout", "dropout+padding")


def draw(rows: list[dict], folder: Path, title: str) -> list[Path]:
    """Two PNGs from rows of the section 'standard'; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["section"] == "standard" and "error" not in row]
    by_key = {(row["peer"], row["variant"], row["S"]): row for row in rows}
    lengths = sorted({row["S"] for row in rows})
    pictures = (
        ("speedup", "times faster, forward + backward", lambda row: row["fwd_ms"] + row["bwd_ms"]),
        ("memory", "times less extra memory, forward + backward", lambda row: row["peak_mib"]),
    )
    paths = []
    for name, label, value in pictures:
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for variant in VARIANTS:
            points = [
                (s, value(by_key["standard", variant, s]) / value(by_key["hf_flash", variant, s]))
                for s in lengths
                if ("standard", variant, s) in by_key and ("hf_flash", variant, s) in by_key
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=variant.replace("+", " + "))
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(lengths, [str(s) for s in lengths])
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
        axes.set_xlabel("sequence length (tokens)")
        axes.set_ylabel(label)
        axes.set_title(f"hf_flash against standard attention, {title}")
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
    return paths
