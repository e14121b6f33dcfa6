"""The benchmark's verdicts on planted rows, and its cells: sizes that can be measured, names that goals find."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the repository")


@pytest.fixture
def goals(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import goals

    return goals


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    return peers


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


def test_a_verdict_names_the_peers_that_were_not_measured(goals):
    import report

    rows = [row("hf_flash", 1.0), row(goals.CUDNN, 0.9), row("flash-attn 3", 1.1)]
    (title,) = [
        line
        for line in report.verdicts(rows)
        if line.startswith("hf_flash, peers, forward: 16k tokens, against the best")
    ]
    assert "(NOT MEASURED: flash-attn 4)" in title
    rows.append(row("flash-attn 4", 1.2, section="grouped"))  # elsewhere
    assert not [line for line in report.verdicts(rows) if "flash-attn 4)" in line]


def test_against_our_plain_cell_by_rate(goals):
    goal = goals.Goal("", "extras", "forward", "plain", 0.6, cells=goals.has("alibi"))
    cell = {"section": "extras", "variant": "alibi"}
    rows = [row("hf_flash plain", 1.0, **cell), row("hf_flash", 2.0, **cell), row("hf_flash", 0.5, **cell, D=128)]
    here, alone = goals.judge(goal, rows)
    assert here.ratio == pytest.approx(0.5) and here.met(goal.floor) is False
    assert alone.ratio is None  # nobody ran the plain cell of D 128


def test_every_goal_has_cells_in_its_section(goals, cases, peers):
    everyone, _ = peers.all_peers(flex=False)
    for goal in goals.GOALS:
        made = [
            (c, {"variant": c.variant, "S": c.S, "D": c.D, "causal": c.causal, "dropout": c.dropout})
            for c in cases.cases_of(goal.section)
        ]
        meant = [case for case, cell in made if goal.cells(cell)]
        assert meant, goal
        if goal.against == "plain":
            names = [{peer.name for peer in peers.peers_of(case, everyone)} for case in meant]
            assert all({goal.ours, f"{goal.ours} plain"} <= here for here in names), goal


def test_the_plain_cell_of_a_case_has_its_rows_and_nothing_else(cases):
    for case in cases.packed("packed") + cases.bert("bias", (512,), terms=("bias", "graph")):
        tokens = sum(cases.RAGGED) if "packed" in case.terms else case.B * case.S
        case.q = case.k = case.v = case.dout = torch.empty(tokens, case.H, case.D, device="meta")
        plain = case.plain()
        assert plain.q.shape == (plain.B, plain.S, case.H, case.D) and tokens == plain.B * plain.S
        assert len(plain.inputs) == 3 and plain.dropout == 0 and plain.causal == case.causal
        assert set(plain.terms) <= {"graph"} and plain.variant in ("plain", "causal", "graph")


def test_cells_are_named_apart(cases):
    for section in cases.SECTIONS:
        cells = [(c.variant, c.dtype, c.B, c.S, c.H, c.D) for c in cases.cases_of(section)]
        assert len(set(cells)) == len(cells), section


def test_the_ragged_batch_has_the_tokens_of_the_plain_cells(cases):
    assert sum(cases.RAGGED) == 16384 and min(cases.RAGGED) >= 256 and max(cases.RAGGED) == 4096
