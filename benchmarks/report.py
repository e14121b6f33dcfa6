"""What the benchmark says, as lines: a table of rates, ratios to each peer, and which goals the rows meet."""

from __future__ import annotations

from goals import GOALS, HOST_MICROSECONDS, Goal, geometric_mean, judge, value


def table(rows: list[dict]) -> list[str]:
    """One line a case, forward/backward TFLOP/s a peer; then each peer's ratios by section."""
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "fwd_tflops" in row:
            cells.setdefault((row["section"], row["D"], row["variant"], row["S"]), {})[row["peer"]] = row
    lines = ["forward/backward TFLOP/s; the backward counts 2.5 times the forward's operations"]
    for section in dict.fromkeys(key[0] for key in cells):
        here = {key: by for key, by in cells.items() if key[0] == section}
        names = list(dict.fromkeys(name for by in here.values() for name in by))
        names.sort(key=lambda name: (name != "hf_flash", not name.startswith("hf_flash")))
        lines += [
            "",
            f"{section:9} {'D':>3} {'variant':22} {'S':>6} "
            + " ".join(f"{n.replace('hf_flash ', 'our ')[:13]:>13}" for n in names),
        ]
        for (_, d, variant, s), by in here.items():
            values = (
                f"{by[n]['fwd_tflops']:>6.0f}/{by[n]['bwd_tflops']:<6.0f}" if n in by else " " * 13 for n in names
            )
            lines.append(f"{section:9} {d:>3} {variant:22} {s:>6} " + " ".join(values))
        for name in names[1:]:
            if name.endswith(" plain"):  # its work is another one; goals.py compares the rates
                continue
            lines += ratios_to(name, section, list(here.values()))
    return lines


def ratios_to(name: str, section: str, cells: list[dict[str, dict]]) -> list[str]:
    pairs = [(by["hf_flash"], by[name]) for by in cells if "hf_flash" in by and name in by]
    if not pairs:
        return []
    columns = []
    for what in ("forward", "backward", "both", "memory"):
        ratios = [value(other, what) / value(own, what) for own, other in pairs]
        columns.append(f"{what} {geometric_mean(ratios):5.2f} (least {min(ratios):.2f})")
    return [f"{section:9} against {name:22} geometric means: " + ", ".join(columns)]


def complaints(rows: list[dict], left_out: list[str]) -> list[str]:
    """Peers that failed in a cell, and those that cannot compute it at all."""
    failed = [
        f"failed: {row['section']} {row['variant']} D{row['D']} S{row['S']} {row['peer']}: {row['error']}"
        for row in rows
        if "error" in row
    ]
    return ["", *failed, *(f"left out: {line}" for line in left_out)]


def verdicts(rows: list[dict]) -> list[str]:
    """For each goal whose section was measured: cell, ours, best peer, ratio, met or not; last what is missed."""
    lines, missed = [], []
    for goal in GOALS:
        judged = judge(goal, rows)
        if judged:
            more, failed = verdict_on(goal, judged, unmeasured(goal, rows))
            lines += more
            missed += failed
    more, failed = host_verdict(rows)
    missed += failed
    return [*lines, *more, "", f"{len(missed)} floors missed", *(f"  {line}" for line in missed)]


def unmeasured(goal: Goal, rows: list[dict]) -> list[str]:
    """Peers of a goal without a time in any row: a verdict of the fastest one says nothing about them."""
    measured = {row["peer"] for row in rows if "fwd_ms" in row}
    return [name for name in goal.against if name not in measured] if isinstance(goal.against, tuple) else []


def verdict_on(goal: Goal, judged: list, absent: list[str]) -> tuple[list[str], list[str]]:
    """(one goal's table, what it missed in a few words). absent: its peers that were not measured."""
    hope = f", hoped for {goal.aim:g}" if goal.aim else ""
    without = f" (NOT MEASURED: {', '.join(absent)})" if absent else ""
    title = f"{goal.ours}, {goal.section}, {goal.what}: {goal.words}{without}"
    lines = ["", f"{title}; floor {goal.floor:g}{hope}"]
    for verdict in judged:
        word = {True: "met", False: "MISSED", None: "not measured"}[verdict.met(goal.floor)]
        best = f"{verdict.best:10.3f}" if verdict.best is not None else " " * 10
        ratio = f"{verdict.ratio:8.2f}" if verdict.ratio is not None else " " * 8
        lines.append(f"  {verdict.cell:34}{verdict.ours:10.3f}{best} {verdict.name:22}{ratio}  {word}")
    count = sum(verdict.met(goal.floor) is False for verdict in judged)
    ratios = [verdict.ratio for verdict in judged if verdict.ratio is not None]
    missed = [f"{title}: {count} of {len(judged)} cells, least {min(ratios):.2f}"] if count else []
    if goal.mean and ratios:
        mean = geometric_mean(ratios)
        lines.append(f"  geometric mean {mean:.3f}, floor {goal.mean:g}: {'met' if mean >= goal.mean else 'MISSED'}")
        missed += [f"{title}: geometric mean {mean:.3f}"] if mean < goal.mean else []
    return lines, missed


def host_verdict(rows: list[dict]) -> tuple[list[str], list[str]]:
    host = {row["peer"]: row for row in rows if "fwd_us" in row}
    if len(host) < 2:
        return [], []
    lines = ["", "host time of one call at B1 H12 S128 D64, in microseconds, against scaled_dot_product_attention's"]
    ours = host.pop("hf_flash")
    (theirs,) = host.values()
    missed = []
    for name, more in HOST_MICROSECONDS.items():
        met = ours[name] <= theirs[name] + more
        missed += [] if met else [f"host time, {name}: {ours[name] - theirs[name]:.0f} us more, allowed {more}"]
        word = "met" if met else "MISSED"
        lines.append(f"  {name:8} {ours[name]:8.1f} {theirs[name]:8.1f} allowed {theirs[name] + more:8.1f}  {word}")
    return lines, missed
