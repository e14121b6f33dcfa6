"""What lies outside the ranges is never used: NaN, infinities and huge values there change no bit of any result."""

import pytest
import torch
from attention_rule import int32, make_qkv, random_like, run, seed_tensor

POISONS = [float("nan"), float("inf"), -float("inf"), 6e4]


def outside(ranges, length, device):
    index = torch.arange(length, device=device)
    begin, end = ranges.unbind(-1)
    return (index < begin[:, None]) | (index >= end[:, None])


def padded_results(device, dtype, poison, **options):
    batch, seqlen_q, seqlen_k = 4, 75, 141
    q, k, v = make_qkv(device, dtype, batch, seqlen_q, seqlen_k, heads=4, heads_k=2)
    key_range = int32([[0, 100], [37, seqlen_k], [64, 65], [9, 9]], device)
    query_range = int32([[0, 60], [11, seqlen_q], [0, seqlen_q], [16, 32]], device)
    out_q, out_k = outside(query_range, seqlen_q, device), outside(key_range, seqlen_k, device)
    bias = random_like(torch.empty(batch, 4, seqlen_q, seqlen_k), dtype, 3).to(device)
    dout = random_like(torch.empty(batch, seqlen_q, 4, 32), dtype, 4).to(device)
    dlse = random_like(torch.empty(batch, 4, seqlen_q), torch.float32, 5).to(device)
    q[out_q], k[out_k], v[out_k], dout[out_q] = poison, poison, poison, poison
    bias.masked_fill_(out_q[:, None, :, None] | out_k[:, None, None, :], poison)
    dlse.masked_fill_(out_q[:, None], poison)
    options = dict(key_range=key_range, query_range=query_range, bias=bias, **options)
    return run(q, k, v, options, dout=dout, dlse=dlse)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("causal", [False, True])
def test_ranges_keep_poison_out(device, dtype, poison, causal):
    dropout = {"dropout_p": 0.2, "dropout_seed": seed_tensor(1, device)}
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device)
    options = dict(causal=causal, sink=sink, deterministic=True, **dropout)
    clean, poisoned = (padded_results(device, dtype, x, **options) for x in (0.0, poison))
    for name in clean:
        assert torch.equal(clean[name], poisoned[name]), f"{poison} outside the ranges changes {name}"
        assert name == "lse" or clean[name].isfinite().all()


def packed_results(device, dtype, poison):
    q, k, v = make_qkv(device, dtype, None, 90, 120, heads=4, heads_k=2)
    dout = random_like(q, dtype, 4)
    dlse = random_like(torch.empty(4, 90), torch.float32, 5).to(device)
    # Before the first sequence and after the last lie rows that belong to none.
    cu_q, cu_k = int32([5, 40, 40, 83], device), int32([9, 70, 75, 111], device)
    for t, used in ((q, (5, 83)), (k, (9, 111)), (v, (9, 111)), (dout, (5, 83))):
        t[: used[0]], t[used[1] :] = poison, poison
    dlse[:, :5], dlse[:, 83:] = poison, poison
    options = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": 50,
        "max_seqlen_k": 64,
        "deterministic": True,
    }
    return run(q, k, v, options | {"causal": True}, dout=dout, dlse=dlse)


@pytest.mark.parametrize("poison", POISONS)
def test_rows_of_no_sequence_keep_poison_out(device, dtype, poison):
    clean, poisoned = packed_results(device, dtype, 0.0), packed_results(device, dtype, poison)
    for name in clean:
        assert torch.equal(clean[name], poisoned[name]), f"{poison} in rows of no sequence changes {name}"
    assert (clean["out"][:5] == 0).all() and (clean["lse"][:, 83:] == -float("inf")).all()
    assert (clean["dq"][83:] == 0).all() and (clean["dk"][:9] == 0).all() and (clean["dv"][111:] == 0).all()


def test_neighbouring_sequences_do_not_mix(device, dtype):
    """Poison in one sequence of a packed batch stays there."""
    q, k, v = make_qkv(device, dtype, None, 150, 150)
    options = {
        "cu_seqlens_q": int32([0, 47, 100, 150], device),
        "max_seqlen_q": 53,
        "max_seqlen_k": 53,
        "deterministic": True,
    }
    options["cu_seqlens_k"] = options["cu_seqlens_q"]
    clean = run(q, k, v, options)
    for t in (q, k, v):
        t[47:100] = float("nan")
    poisoned = run(q, k, v, options)
    for name in ("out", "dq", "dk", "dv"):
        for part in (slice(0, 47), slice(100, 150)):
            assert torch.equal(clean[name][part], poisoned[name][part]), name


def test_neighbouring_batch_entries_do_not_mix(device, dtype):
    q, k, v = make_qkv(device, dtype, 3, 70, 70)
    clean = run(q, k, v, {"deterministic": True})
    for t in (q, k, v):
        t[1] = float("inf")
    poisoned = run(q, k, v, {"deterministic": True})
    for name in ("out", "dq", "dk", "dv"):
        for b in (0, 2):
            assert torch.equal(clean[name][b], poisoned[name][b]), name
