"""The benchmark's verdicts on planted rows, and its cells: sizes that can be measured, names that goals find."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the repository")


@pytest.fixture
def goals(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import goals

    return goals


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cases

    return cases


def row(peer, fwd_ms, bwd_ms=1.0, **changes):
    cell = {"section": "peers", "variant": "plain", "dtype": "bfloat16", "B": 8, "S": 2048, "H": 32, "D": 64}
    rates = {"fwd_tflops": round(100 / fwd_ms), "bwd_tflops": round(250 / bwd_ms), "peak_mib": 10.0}
    return cell | {"peer": peer, "causal": False, "fwd_ms": fwd_ms, "bwd_ms": bwd_ms} | rates | changes


def test_the_fastest_of_the_peers_counts(goals):
    goal = goals.Goal("", "peers", "forward", (goals.FLASH, goals.CUDNN), 0.95)
    rows = [row("hf_flash", 1.0), row(goals.FLASH, 2.0), row(goals.CUDNN, 0.9), row(goals.EFFICIENT, 0.1)]
    (verdict,) = goals.judge(goal, rows)
    assert verdict.name == goals.CUDNN and verdict.ratio == pytest.approx(0.9) and verdict.met(goal.floor) is False


def test_a_peer_that_failed_or_is_missing_is_no_verdict(goals):
    goal = goals.Goal("", "peers", "backward", (goals.CUDNN,), 0.95)
    failed = {k: v for k, v in row(goals.CUDNN, 1.0).items() if not k.endswith("ms")} | {"error": "out of memory"}
    (verdict,) = goals.judge(goal, [row("hf_flash", 1.0), failed, row(goals.CUDNN, 0.1, S=4096)])
    assert verdict.ratio is None and verdict.met(goal.floor) is None


def test_against_our_plain_cell_by_rate(goals):
    goal = goals.Goal("", "extras", "forward", "plain", 0.6, cells=goals.has("alibi"))
    rows = [row("hf_flash", 1.0, section="extras"), row("hf_flash", 2.0, section="extras", variant="alibi")]
    rows += [row("hf_flash", 0.5, section="extras", variant="alibi", D=128)]
    here, alone = goals.judge(goal, rows)
    assert here.ratio == pytest.approx(0.5) and here.met(goal.floor) is False
    assert alone.ratio is None  # no plain cell of D 128


def test_every_goal_has_cells_in_its_section(goals, cases):
    for goal in goals.GOALS:
        made = [
            {"variant": c.variant, "S": c.S, "D": c.D, "causal": c.causal, "dropout": c.dropout}
            for c in cases.cases_of(goal.section)
        ]
        assert any(goal.cells(cell) for cell in made), goal
        if goal.against == "plain":
            assert any(cell["variant"] in ("plain", "causal") for cell in made), goal


def test_cells_are_named_apart(cases):
    for section in cases.SECTIONS:
        cells = [(c.variant, c.dtype, c.B, c.S, c.H, c.D) for c in cases.cases_of(section)]
        assert len(set(cells)) == len(cells), section


def test_the_ragged_batch_has_the_tokens_of_the_plain_cells(cases):
    assert sum(cases.RAGGED) == 16384 and min(cases.RAGGED) >= 256 and max(cases.RAGGED) == 4096
