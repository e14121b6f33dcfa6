"""The operators under torch's tools: opcheck, fake tensors, export and torch.compile without a graph break."""

import pytest
import torch
from attention_rule import int32, make_qkv, seed_tensor

from hf_flash import flash_attention

# torch's tools do not see which kernels serve a call, and compiling takes longer than everything else here.
pytestmark = pytest.mark.architectures("default")


def tail(device, dtype, packed):
    """The arguments after q, k, v in the schema's order, every tensor present that may be."""
    bias = torch.randn(2, 1, 9, 12, device=device, dtype=dtype)
    mask = torch.rand(1, 4, 9, 12, device=device) > 0.2
    starts = int32([0, 4, 9], device), int32([0, 12, 12], device)
    ranges = int32([[0, 9], [1, 5]], device), int32([[0, 9], [2, 9]], device)
    offset = int32([0, 2], device)
    ranges, starts = ((None, None), starts) if packed else (ranges, (None, None))
    return [
        0.3, False, 5, 0, 200, 0, 2.0, True, *((9, 12) if packed else (0, 0)), ranges[0], mask, ranges[1], offset,
        seed_tensor(1, device), torch.rand(4, device=device), *starts, bias, torch.randn(4, device=device),
    ]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(device, dtype, packed):
    q, k, v = make_qkv(device, dtype, None if packed else 2, 9, 12, heads=4, heads_k=2, head_dim=16, head_dim_v=24)
    rest = tail(device, dtype, packed)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.hf_flash.forward.default, (q, k, v, *rest), test_utils=checks)
    out, lse = torch.ops.hf_flash.forward(q, k, v, *rest)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    for wanted in ((True, True), (False, False)):
        args = (dout, dlse, q, k, v, out, lse, *rest, *wanted)
        torch.library.opcheck(torch.ops.hf_flash.backward.default, args, test_utils=checks)
    if not packed:
        torch.library.opcheck(torch.ops.hf_flash.forward.default, (q, k, v, 0.3), test_utils=checks)
        torch.library.opcheck(torch.ops.hf_flash.backward.default, args[:8], test_utils=checks)
        heads = [t.transpose(1, 2) for t in (q, k, v)]
        rest[1] = True
        torch.library.opcheck(torch.ops.hf_flash.forward.default, (*heads, *rest), test_utils=checks)
        args = (dout, dlse, *heads, out, lse, *rest)
        torch.library.opcheck(torch.ops.hf_flash.backward.default, args, test_utils=checks)
    torch.library.opcheck(torch.ops.hf_flash.row_sum.default, (dout, out, dlse), test_utils=checks)


def test_opcheck_of_the_dropout_mask(device):
    args = (seed_tensor(1, device), 2, 3, 17, 20, 200)
    torch.library.opcheck(torch.ops.hf_flash.dropout_mask.default, args)


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def results(function, tensors, *more):
    used = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    out = function(*used, *more)
    out.float().square().sum().backward()
    return [out.detach(), *(t.grad for t in used if t.grad is not None)]


def agree(a, b, dtype):
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def test_compile_padded_with_dynamic_shapes(device, plain_dtype):
    def layer(q, k, v, bias, key_range):
        return 2 * flash_attention(q, k, v, bias=bias, key_range=key_range, causal=True, softcap=5.0)

    fast = compiled(layer)
    for batch, seqlen in ((2, 16), (3, 40), (1, 33)):
        tensors = (
            *make_qkv(device, plain_dtype, batch, seqlen, seqlen, heads=4, heads_k=2),
            torch.randn(1, 4, seqlen, seqlen, device=device, dtype=plain_dtype),
        )
        key_range = int32([[0, seqlen - b] for b in range(batch)], device)
        agree(results(fast, tensors, key_range), results(layer, tensors, key_range), plain_dtype)


class HalfWindow(torch.nn.Module):
    """Each query sees the last half of a row before it."""

    def forward(self, q):
        return flash_attention(q, q, q, window=(q.shape[1] // 2, 0))


def test_a_window_may_follow_from_a_dynamic_length():
    dynamic = {"q": {1: torch.export.Dim("length", min=4, max=64)}}
    exported = torch.export.export(HalfWindow(), (torch.randn(1, 16, 2, 8),), dynamic_shapes=dynamic, strict=False)
    q = torch.randn(1, 20, 2, 8)
    assert torch.equal(exported.module()(q), HalfWindow()(q))


def test_compile_packed_with_dynamic_shapes(device, plain_dtype):
    def layer(q, k, v, starts, longest: int):
        lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return flash_attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, window=(7, 0), **lengths)

    fast = compiled(layer)
    for lengths in ((5, 9), (20, 3, 7), (1, 30)):
        starts = int32([sum(lengths[:b]) for b in range(len(lengths) + 1)], device)
        tensors = make_qkv(device, plain_dtype, None, sum(lengths), sum(lengths))
        args = (starts, max(lengths))
        agree(results(fast, tensors, *args), results(layer, tensors, *args), plain_dtype)


def test_one_tensor_twice(device, plain_dtype):
    """Dynamo takes no autograd function whose inputs are one tensor."""

    def layer(x, y):
        return flash_attention(x, x, x, causal=True) + flash_attention(x, y, y)

    tensors = make_qkv(device, plain_dtype, 2, 20, 20)[:2]
    agree(results(compiled(layer), tensors), results(layer, tensors), plain_dtype)


def test_a_rate_that_rounds_to_nothing(device, plain_dtype):
    def layer(q, k, v):
        return flash_attention(q, k, v, dropout_p=0.001)

    tensors = make_qkv(device, plain_dtype, 1, 8, 8)
    with pytest.warns(UserWarning, match="rounds to no dropout"):
        want = layer(*tensors)
    assert torch.equal(compiled(layer)(*tensors), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("trace", ["compile", "jit"])
def test_traced_packed_calls_do_not_remember_the_longest(device, plain_dtype, trace, checked, monkeypatch):
    """max_seqlen is not read from the sequences of the day of tracing, nor are their values checked then."""
    monkeypatch.setattr("hf_flash.attention.CHECK_VALUES", checked)

    def layer(q, k, v, starts):
        return flash_attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts)

    tensors = make_qkv(device, plain_dtype, None, 9, 9)
    fast = compiled(layer) if trace == "compile" else torch.jit.trace(layer, (*tensors, int32([0, 4, 9], device)))
    for starts in ([0, 4, 9], [0, 1, 9], [0, 0, 9]):
        torch.testing.assert_close(
            fast(*tensors, int32(starts, device)), layer(*tensors, int32(starts, device)), rtol=0, atol=0
        )


def test_compile_with_dropout(device, plain_dtype):
    """The given seed drops the same; without one, the compiled layer draws and its backward uses the same mask."""

    def given(q, k, v, seed):
        return flash_attention(q, k, v, dropout_p=0.5, dropout_seed=seed, mask=None)

    tensors = make_qkv(device, plain_dtype, 2, 24, 24)
    seed = seed_tensor(3, device)
    agree(results(compiled(given), tensors, seed), results(given, tensors, seed), plain_dtype)

    drawn = compiled(lambda q, k, v: flash_attention(q, k, v, dropout_p=0.5))
    zeros = [torch.zeros(1, 24, 1, 8, device=device, dtype=plain_dtype) for _ in range(2)]
    v = torch.eye(24, device=device, dtype=plain_dtype)[None, :, None].requires_grad_()
    out = drawn(*zeros, v)
    out.backward(torch.eye(24, device=device, dtype=plain_dtype)[None, :, None])
    assert torch.equal(v.grad[0, :, 0].mT != 0, out[0, :, 0] != 0)
    assert not torch.equal(drawn(*zeros, v), out)


def test_compile_with_lse_and_sink(device, plain_dtype):
    def layer(q, k, v, sink):
        out, lse = flash_attention(q, k, v, sink=sink, return_lse=True)
        return out.float() * lse.transpose(1, 2)[..., None].sigmoid()

    tensors = *make_qkv(device, plain_dtype, 2, 20, 26), torch.randn(2, device=device)
    agree(results(compiled(layer), tensors), results(layer, tensors), plain_dtype)


def test_inductor(device, plain_dtype):
    """The default backend, whose generated code surrounds the operator."""

    def layer(x, weight):
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 32)).unbind(2)
        return torch.relu(flash_attention(q, k, v, causal=True).flatten(2))

    tensors = [torch.randn(2, 19, 64, device=device).to(plain_dtype), 0.1 * torch.randn(64, 192, device=device)]
    tensors[1] = tensors[1].to(plain_dtype)
    agree(results(compiled(layer, "inductor"), tensors), results(layer, tensors), plain_dtype)


def test_fake_tensors_have_the_shapes_of_real_ones(device, dtype):
    q, k, v = make_qkv(device, dtype, 2, 9, 12, heads=4, heads_k=2, head_dim=16, head_dim_v=24)
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (q, k, v)]
        out, lse = flash_attention(*fakes, return_lse=True)
    real_out, real_lse = flash_attention(q, k, v, return_lse=True)
    for fake, real in ((out, real_out), (lse, real_lse)):
        assert fake.shape == real.shape and fake.dtype == real.dtype and fake.stride() == real.stride()
