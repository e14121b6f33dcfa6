"""A few calls of every kind of kernel, small enough for compute-sanitizer; run by test_sanitizer.py."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_rule import int32, make_qkv, run, seed_tensor


def calls(device, dtype, keys):
    """(q, k, v, options): every head-dim bucket, every term of the score, every way to say where sequences lie.

    keys: of most. With more than 512 no kernel of head dimension 64 reads sums that the TMA engine stored.
    """
    dropout = {"dropout_p": 0.2, "dropout_seed": seed_tensor(1, device)}
    for head_dim in (40, 64, 96, 128, 192, 256):
        yield *make_qkv(device, dtype, 1, 77, 101, heads=2, heads_k=1, head_dim=head_dim), {"causal": True} | dropout
    qkv = make_qkv(device, dtype, 2, 77, keys, heads=2, heads_k=1, head_dim=64)
    ranges = {"key_range": int32([[5, 99], [64, 64]], device), "query_range": int32([[0, 70], [3, 77]], device)}
    yield *qkv, ranges  # one of the CTAs of a head writes dq
    yield *make_qkv(device, dtype, 2, 133, 290, heads=2, heads_k=1, head_dim=128), dropout
    for heads, seqlen, head_dim in ((70, 200, 64), (2, 300, 128)):  # sums of dQ go from CTA to CTA, of several heads
        yield *make_qkv(device, dtype, 1, seqlen, seqlen, heads=heads, head_dim=head_dim), {}
    takes_turns = {"deterministic": keys <= 512}
    yield *make_qkv(device, dtype, 1, 530, 520, heads=2, head_dim=64), takes_turns
    yield *make_qkv(device, dtype, 1, 200, 257, heads=88, heads_k=44, head_dim=64), takes_turns  # not in parts
    in_parts = make_qkv(device, dtype, 2, 140, 270, heads=6, heads_k=1, head_dim=64)  # few key tiles, many heads
    spans = {"key_range": int32([[5, 260], [64, 64]], device), "query_range": int32([[0, 70], [3, 140]], device)}
    yield *in_parts, spans | {"causal": True}
    q, k, v = make_qkv(device, dtype, None, 150, 200, heads=6, heads_k=1, head_dim=128)  # with a gap at the end
    starts = {"cu_seqlens_q": int32([0, 60, 130], device), "cu_seqlens_k": int32([0, 90, 180], device)}
    yield q, k, v, starts | {"max_seqlen_q": 70, "max_seqlen_k": 90}
    for head_dim in (64, 128, 192):  # several key tiles, the first of which may store; in either order
        qkv_tiles = make_qkv(device, dtype, 1, 150, 290, heads=2, heads_k=1, head_dim=head_dim)
        for deterministic in (False, True):
            yield *qkv_tiles, {"causal": True, "deterministic": deterministic}
    yield *make_qkv(device, dtype, 1, 530, 520, heads=1, head_dim=128), {"causal": True}  # query tiles of 80
    one_step = {"query_range": int32([[80, 160]], device)}  # and several pieces of work a multiprocessor
    yield *make_qkv(device, dtype, 1, 530, 520, heads=60, head_dim=128), one_step
    yield *make_qkv(device, dtype, 1, 2560, 520, heads=27, head_dim=64), {}  # CTAs share the last pieces of work
    slopes, sink = torch.rand(2, device=device), torch.randn(2, device=device)
    bias = torch.randn(1, 2, 77, keys, device=device, dtype=dtype)
    mask = torch.rand(2, 1, 1, keys, device=device) > 0.3
    yield *qkv, {"mask": mask}  # of keys alone, whose rows begin anywhere
    aligned = torch.rand(2, 1, 1, keys + 3, device=device) > 0.3
    for head_dim in (64, 128, 192):
        yield *make_qkv(device, dtype, 2, 77, keys + 3, heads=2, head_dim=head_dim), {"mask": aligned} | ranges
    yield *qkv, ranges | {"window": (9, 4)}
    yield *qkv, ranges | dropout | {"bias": bias, "sink": sink, "alibi_slopes": slopes, "softcap": 3.0, "mask": mask}
    rows_for_tma = torch.nn.functional.pad(bias, (0, 3))[..., :keys]
    yield *qkv, ranges | {"bias": rows_for_tma, "alibi_slopes": slopes}
    yield *qkv, dropout | {"bias": rows_for_tma}
    yield *qkv, ranges | dropout | {"bias": rows_for_tma, "alibi_slopes": slopes, "softcap": 3.0}
    for shape in ((1, 4, 300, 296), (1, 1, 1, 1)):  # copied, and summed over more tiles than are listed at once
        q128 = make_qkv(device, dtype, 2, 300, 290, heads=4, head_dim=128)
        yield *q128, {"bias": torch.randn(shape, device=device, dtype=dtype)[..., :290], "causal": True}
    yield (
        *qkv,
        {"bias": bias[:, :, :1], "query_offset": int32([3, -200], device), "causal": True},
    )
    q, k, v = make_qkv(device, dtype, None, 90, 130, heads=2, head_dim=64)
    starts = {"cu_seqlens_q": int32([0, 33, 33, 88], device), "cu_seqlens_k": int32([0, 70, 75, 130], device)}
    yield q, k, v, starts | dropout | {"max_seqlen_q": 55, "max_seqlen_k": 70, "causal": True}
    wrong = {"cu_seqlens_q": int32([-4, 200, 7, 91], device), "cu_seqlens_k": int32([9, 3, 2**31 - 1, 0], device)}
    wrong |= {"max_seqlen_q": 90, "max_seqlen_k": 130}
    yield q, k, v, wrong
    yield q, k, v, wrong | {"mask": torch.rand(3, 1, 1, 130, device=device) > 0.3}


def main(device="cuda", keys="141"):
    count = 0
    for q, k, v, options in calls(device, torch.float16, int(keys)):
        run(q, k, v, options)
        count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls done")


if __name__ == "__main__":
    main(*sys.argv[1:])
