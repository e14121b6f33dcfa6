"""What is special about the GPU's kernels; everything else in tests/ops and tests/functions runs there too."""

import copy
import os

import pytest
import torch
from attention_fuzz import fuzz
from attention_rule import check, dropped, int32, make_qkv, poison_freed_memory, run, seed_tensor
from cuda_graphs import captured

from hf_flash import flash_attention
from hf_flash.reference import dropout_keep, dropout_mask

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@DTYPES
@pytest.mark.parametrize("part", range(10))
def test_random_calls_obey_the_rule(dtype, part):
    """2,000 calls in all, longer than the CPU's, in parts that several processes share."""
    fuzz(1000, "cuda", dtype, part, parts=10, longest=260)


@DTYPES
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(dtype, head_dim):
    q, k, v = make_qkv("cuda", dtype, 2, 113, 191, heads=2, heads_k=1, head_dim=head_dim)
    check(q, k, v, causal=True, dropout_p=0.1, dropout_seed=seed_tensor(head_dim, "cuda"))
    check(q, k, v, key_range=int32([[3, 130], [64, 191]], "cuda"))


@DTYPES
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 128), (128, 64), (192, 128), (40, 256), (256, 8)])
def test_head_dims_of_keys_and_values_differ(dtype, head_dim, head_dim_v):
    q, k, v = make_qkv("cuda", dtype, 1, 200, 200, head_dim=head_dim, head_dim_v=head_dim_v)
    check(q, k, v, causal=True)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen", [64, 192, 320, 448, 1088, 127, 257, 509, 1021, 2039])
def test_lengths_at_and_between_tiles(dtype, head_dim, seqlen):
    """S % 128 == 64, and primes."""
    q, k, v = make_qkv("cuda", dtype, 1, seqlen, seqlen, head_dim=head_dim)
    for causal in (False, True):
        check(q, k, v, causal=causal, dropout_p=0.1, dropout_seed=seed_tensor(seqlen, "cuda"))


@DTYPES
@pytest.mark.parametrize("rows, cols", [(1, 700), (300, 257), (129, 512)])
def test_the_masks_of_both_devices_are_equal(dtype, rows, cols):
    for value in (1, -(2**63), 0x0123456789ABCDEF):
        seed = seed_tensor(value, "cpu")
        want = torch.ops.hf_flash.dropout_mask(seed, 2, 3, rows, cols, dropout_keep(0.3))
        assert torch.equal(torch.ops.hf_flash.dropout_mask(seed.cuda(), 2, 3, rows, cols, 179).cpu(), want)
        assert torch.equal(dropped(seed, 2, 3, rows, cols, 0.3, dtype, "cuda").cpu(), want)
        if value == 1:
            assert torch.equal(dropped(seed, 2, 3, rows, cols, 0.3, dtype, "cpu"), want)


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_the_backward_drops_the_same_at_every_tile_size(dtype, head_dim):
    """dv with dout a slice of the unit matrix is the dropped weights, transposed."""
    seed, rows, cols = seed_tensor(-77, "cuda"), 300, 210
    want = dropout_mask(seed, 1, 2, rows, cols, dropout_keep(0.3))
    q = torch.zeros(1, rows, 2, head_dim, device="cuda", dtype=dtype)
    k = torch.zeros(1, cols, 2, head_dim, device="cuda", dtype=dtype)
    for first in range(0, rows, head_dim):
        v = torch.zeros(1, cols, 2, head_dim, device="cuda", dtype=dtype, requires_grad=True)
        dout = torch.eye(rows + head_dim, device="cuda", dtype=dtype)[:rows, first : first + head_dim]
        out = flash_attention(q, k, v, dropout_p=0.3, dropout_seed=seed)
        out.backward(dout[None, :, None].expand_as(out))
        here = min(head_dim, rows - first)
        got = v.grad.permute(0, 2, 3, 1)[:, :, :here] != 0
        assert torch.equal(got, want[:, :, first : first + here])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_pieces_of_work_of_few_steps(head_dim, deterministic):
    """More tiles than multiprocessors, some with a single partner: kernels whose CTAs stay must not wait for ever."""
    for shape, causal in (((2, 1088, 16), True), ((24, 64, 16), False), ((20, 192, 16), True)):
        batch, seqlen, heads = shape
        q, k, v = make_qkv("cuda", torch.bfloat16, batch, seqlen, seqlen, heads=heads, head_dim=head_dim)
        check(q, k, v, causal=causal, deterministic=deterministic)
    lengths = [1 + 37 * n % 200 for n in range(24)]
    starts = int32([sum(lengths[:n]) for n in range(25)], "cuda")
    q, k, v = make_qkv("cuda", torch.float16, None, sum(lengths), sum(lengths), heads=16, head_dim=head_dim)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 200, "max_seqlen_k": 200}
    check(q, k, v, **packed, causal=True, deterministic=deterministic)
    check(q, k, v, **packed, dropout_p=0.1, dropout_seed=seed_tensor(3, "cuda"), deterministic=deterministic)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_sequences_of_unlike_lengths(head_dim, causal):
    """Kernels list their tiles 32 sequences at a time; some have no queries, no keys or neither."""
    rows = [0 if n % 9 == 0 else 1 + 53 * n % 310 for n in range(75)]
    keys = [0 if n % 6 == 3 else 1 + 71 * n % 350 for n in range(75)]
    starts_q, starts_k = (int32([sum(x[:n]) for n in range(76)], "cuda") for x in (rows, keys))
    q, k, v = make_qkv("cuda", torch.bfloat16, None, sum(rows), sum(keys), heads=2, heads_k=1, head_dim=head_dim)
    packed = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "max_seqlen_q": 310, "max_seqlen_k": 350}
    poison_freed_memory()
    check(q, k, v, **packed, causal=causal)
    q, k, v = make_qkv("cuda", torch.bfloat16, 70, 140, 530, heads=2, heads_k=1, head_dim=head_dim)
    ranges = [[60 * n % 400, min(530, 60 * n % 400 + 90 * n % 500)] for n in range(70)]
    computed = [[0, 0] if n % 8 == 5 else [n % 3, 140] for n in range(70)]
    poison_freed_memory()
    check(q, k, v, key_range=int32(ranges, "cuda"), query_range=int32(computed, "cuda"), causal=causal)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seqlen_k", [100, 300, 1000])
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_every_row_of_dq_is_written(head_dim, seqlen_k, deterministic):
    """Rows that are computed and see keys or not, in tiles that some key tile reaches or none does."""
    q, k, v = make_qkv("cuda", torch.bfloat16, 7, 450, seqlen_k, heads=4, heads_k=2, head_dim=head_dim)
    keys = [[0, seqlen_k], [0, 0], [60, 61], [37, seqlen_k - 10], [seqlen_k, seqlen_k], [40, 80], [0, seqlen_k]]
    rows = [[0, 450], [0, 450], [13, 70], [150, 150], [64, 128], [300, 450], [10, 40]]
    ranges = {"key_range": int32(keys, "cuda"), "query_range": int32(rows, "cuda")}
    for options in ({}, ranges, ranges | {"dropout_p": 0.1, "dropout_seed": seed_tensor(3, "cuda")}):
        poison_freed_memory()
        dq = check(q, k, v, **options, deterministic=deterministic, small=True)["dq"]  # some entries see one key
        for b, ((first_key, last_key), (begin, end)) in enumerate(zip(keys, rows, strict=True)):
            if options and first_key == last_key:
                assert (dq[b] == 0).all()
            elif options:
                assert (dq[b, :begin] == 0).all() and (dq[b, end:] == 0).all()
    lengths = [[64, 0, 129, 257], [130, 300, 0, 570]]
    starts = [int32([sum(n[:b]) for b in range(5)], "cuda") for n in lengths]
    q, k, v = make_qkv("cuda", torch.float16, None, 450, 1000, heads=4, heads_k=2, head_dim=head_dim)
    packed = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": 257, "max_seqlen_k": 570}
    poison_freed_memory()
    check(q, k, v, **packed, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim, seqlen_k", [(160, 100), (160, 1060), (256, 100), (256, 1000), (256, 1060)])
def test_every_key_tile_over_128(head_dim, seqlen_k, deterministic):
    """Over 128 Hopper's tiles have 64 keys, or 128 where two CTAs share them: some see no query, one key or a part."""
    q, k, v = make_qkv("cuda", torch.bfloat16, 6, 450, seqlen_k, heads=4, heads_k=2, head_dim=head_dim)
    keys = [[0, seqlen_k], [0, 0], [60, 61], [64, seqlen_k - 10], [0, 64], [70, 90]]
    rows = [[0, 450], [0, 450], [13, 200], [0, 450], [64, 128], [300, 450]]
    ranges = {"key_range": int32(keys, "cuda"), "query_range": int32(rows, "cuda")}
    bias = {"bias": torch.randn(6, 4, 450, seqlen_k, device="cuda", dtype=torch.bfloat16)}
    dropout = {"dropout_p": 0.1, "dropout_seed": seed_tensor(3, "cuda")}
    for options in ({}, ranges, ranges | bias | dropout, ranges | {"softcap": 20.0}):
        for causal in (False, True):
            options = options | {"causal": causal, "deterministic": deterministic}
            check(q, k, v, **options, small=True)  # some entries see one key
            if deterministic:
                first, again = run(q, k, v, options), run(q, k, v, options)
                assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen", [128, 200, 384, 512])  # up to kFinishedKeys of csrc/sm90/config.h
def test_short_gradients_have_the_same_bits(head_dim, seqlen):
    """On Hopper, without being asked: the key tiles of a head take turns there, and the last one writes dq."""
    if torch.cuda.get_device_capability()[0] != 9 or os.environ.get("HF_FLASH_ARCH") == "sm80":
        pytest.skip("Hopper's kernels")
    for heads_k, extras in ((12, {}), (4, {"softcap": 20.0, "alibi_slopes": torch.rand(12, device="cuda")})):
        q, k, v = make_qkv("cuda", torch.bfloat16, 9, seqlen, seqlen, heads=12, heads_k=heads_k, head_dim=head_dim)
        options = extras | {"dropout_p": 0.1, "dropout_seed": seed_tensor(1, "cuda")} if extras else {}
        dout = torch.randn_like(q)
        first = run(q, k, v, options, dout=dout)
        for _ in range(50):
            again = run(q, k, v, options, dout=dout)
            assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("deterministic, rows_and_keys", [(True, (1000, 1100)), (False, (1, 1100))])
def test_250_repeats(head_dim, deterministic, rows_and_keys):
    q, k, v = make_qkv("cuda", torch.bfloat16, 2, 1000, 1100, heads=8, heads_k=2, head_dim=head_dim)
    options = {"causal": True, "deterministic": deterministic, "dropout_p": 0.1, "dropout_seed": seed_tensor(1, "cuda")}
    options |= {"bias": torch.randn(1, 8, *rows_and_keys, device="cuda"), "sink": torch.randn(8, device="cuda")}
    dout = torch.randn_like(q)
    first = run(q, k, v, options, dout=dout)
    for _ in range(250):
        again = run(q, k, v, options, dout=dout)
        for name in first:
            if deterministic or name in ("out", "lse", "dbias"):
                assert torch.equal(again[name], first[name]), name
            else:
                scale = first[name].float().abs().max().item()
                torch.testing.assert_close(again[name], first[name], rtol=2e-2, atol=4e-3 * scale)


@pytest.mark.parametrize("ranges", [False, True])
def test_turns_at_tall_query_tiles(ranges):
    """At head dimension 128, where all keys are seen: each key tile of a head starts at a query tile of its own."""
    q, k, v = make_qkv("cuda", torch.bfloat16, 2, 1000, 1100, heads=8, heads_k=2, head_dim=128)
    options = {"deterministic": True}
    if ranges:
        options |= {"key_range": int32([[0, 1100], [130, 901]], "cuda")}
        options |= {"query_range": int32([[3, 1000], [0, 333]], "cuda")}
    check(q, k, v, **options)
    first = run(q, k, v, options)
    for _ in range(50):
        again = run(q, k, v, options)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("seqlen_k, options", [
    (130, {"causal": True, "deterministic": True}),
    (130, {"deterministic": True}),  # sums of dQ from CTA to CTA
    (600, {"deterministic": True}),  # the last turn writes dq
    (513, {"key_range": [[0, 32], [129, 150]]}),  # a conversion that starts while one addition ends
])  # fmt: skip
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_cuda_graph(dropout_p, head_dim, seqlen_k, options):
    """Captured forward and backward replay on new inputs; replays draw new dropout masks from the generator."""
    shape = {"heads": 4, "heads_k": 2, "head_dim": head_dim}
    leaves = [t.requires_grad_() for t in make_qkv("cuda", torch.float16, 2, 100, seqlen_k, **shape)]
    options = {name: int32(x, "cuda") if isinstance(x, list) else x for name, x in options.items()}

    def step():
        out = flash_attention(*leaves, dropout_p=dropout_p, **options)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    graph, replayed = captured(step)
    with torch.no_grad():
        for old, new in zip(leaves, make_qkv("cuda", torch.float16, 2, 100, seqlen_k, **shape, seed=5), strict=True):
            old.copy_(new)
    graph.replay()
    first = [t.clone() for t in replayed]
    graph.replay()
    if dropout_p:
        assert not torch.equal(replayed[0], first[0])
    else:
        assert all(torch.equal(a, b) for a, b in zip(replayed, first, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_streams(head_dim, deterministic):
    """Calls on two streams at once do not disturb one another, nor wait for CTAs that the other's keep out."""
    inputs = [make_qkv("cuda", torch.bfloat16, 4, 700, 700, heads=8, head_dim=head_dim, seed=n) for n in range(2)]
    options = {"causal": True, "deterministic": deterministic}
    want = [run(*qkv, options) for qkv in inputs]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream(), torch.cuda.Stream()], [[], []]
    for _ in range(10):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[n].append(run(*inputs[n], options))
    torch.cuda.synchronize()
    for n in range(2):
        for results in got[n]:
            for name in results:
                if deterministic or name != "dq":
                    assert torch.equal(results[name], want[n][name])
                else:
                    torch.testing.assert_close(results[name], want[n][name], rtol=2**-7, atol=2**-9)


def test_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    q, k, v = make_qkv("cuda:0", torch.float16, 2, 100, 130)
    want = run(q, k, v, {"deterministic": True})
    there = run(*(t.to("cuda:1") for t in (q, k, v)), {"deterministic": True})  # while device 0 is the current one
    for name in want:
        assert there[name].device == torch.device("cuda:1")
        torch.testing.assert_close(there[name].to("cuda:0"), want[name], rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="`k` is on cuda:1 but `q` on cuda:0"):
        flash_attention(q, k.to("cuda:1"), v)


def test_memory_is_linear_in_the_length():
    """Forward and backward hold no S x S matrix: twice the length takes about twice the memory."""

    def peak(seqlen):
        leaves = [t.requires_grad_() for t in make_qkv("cuda", torch.float16, 1, seqlen, seqlen, heads=4, head_dim=64)]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        flash_attention(*leaves, causal=True, dropout_p=0.1).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(8192) < 2.2 * peak(4096) < 2.2 * 64 * 2**20


@DTYPES
def test_cuda_agrees_with_the_cpu(dtype):
    """The same call on both devices, dropout and bias included."""
    q, k, v = make_qkv("cpu", dtype, 2, 150, 170, heads=4, heads_k=2, head_dim=64)
    options = {
        "dropout_p": 0.2,
        "dropout_seed": seed_tensor(4, "cpu"),
        "bias": torch.randn(1, 4, 150, 170),
        "causal": True,
    }
    want = run(q, k, v, options)
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    got = run(q.cuda(), k.cuda(), v.cuda(), moved)
    for name in want:
        torch.testing.assert_close(got[name].cpu(), want[name], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_dtypes_without_a_cuda_kernel_raise(dtype):
    q = torch.zeros(1, 8, 1, 8, device="cuda", dtype=dtype)
    with pytest.raises(NotImplementedError, match=r"FP32|DTYPE"):
        flash_attention(q, q, q)


def tiny_model(kind):
    """(model with eager attention, a batch) of a few thousand parameters, or a skip without Transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 200, "attn_implementation": "eager"}
    torch.manual_seed(0)
    ids = torch.randint(5, 200, (8, 64), device="cuda")
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(config)
        mask = torch.arange(64, device="cuda") < torch.randint(20, 65, (8, 1), device="cuda")
        labels = ids.masked_fill(~mask, -100)
        return model.cuda(), {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=2, n_positions=64, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **sizes
    )
    return transformers.GPT2LMHeadModel(config).cuda(), {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_50_training_steps_follow_eager_attention(kind):
    import hf_flash

    model, batch = tiny_model(kind)

    def losses(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        history = []
        for _ in range(50):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model.train()(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return torch.tensor(history)

    patched = hf_flash.patch_model(copy.deepcopy(model), on_unsupported="error", on_fallback="error")
    want, got = losses(model), losses(patched)
    assert want[-1] < 0.9 * want[0]
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
