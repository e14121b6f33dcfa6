"""The operator under autograd: gradcheck, partial gradients, checkpointing, double backward, in-place changes."""

import pytest
import torch
from attention_rule import int32, make_qkv, seed_tensor
from torch.utils.checkpoint import checkpoint

from hf_flash import flash_attention
from hf_flash.attention import judged_attention


def leaves(*shapes):
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


GRADCHECKS = {
    "plain": {},
    "causal": {"causal": True},
    "window_softcap": {"window": (1, 1), "softcap": 1.3, "scale": 0.5},
    "alibi": {"alibi_slopes": torch.tensor([0.25, 0.5])},
    "mask": {"mask": torch.tensor([[True, False, True, True]])},
    "ranges": {"key_range": int32([[1, 3], [0, 4]], "cpu"), "query_range": int32([[0, 3], [1, 2]], "cpu")},
    "dropout": {"dropout_p": 0.4, "dropout_seed": seed_tensor(3, "cpu")},
    "dropout_softcap": {"dropout_p": 0.4, "dropout_seed": seed_tensor(3, "cpu"), "softcap": 2.0, "causal": True},
}


@pytest.mark.parametrize("options", GRADCHECKS.values(), ids=GRADCHECKS.keys())
@pytest.mark.parametrize("bias_shape", [(1, 2, 3, 4), (2, 1, 1, 4), (1, 1, 3, 1)])
def test_gradcheck(options, bias_shape):
    def f(q, k, v, bias, sink):
        out, lse = flash_attention(q, k, v, bias=bias, sink=sink, **options, return_lse=True)
        return out, lse.clamp(min=-1e9)

    tensors = leaves((2, 3, 2, 8), (2, 4, 1, 8), (2, 4, 1, 16), bias_shape, (2,))
    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_packed(dropout_p):
    def f(q, k, v):
        return flash_attention(
            q, k, v, cu_seqlens_q=int32([0, 2, 2, 5], "cpu"), cu_seqlens_k=int32([0, 3, 4, 7], "cpu"), max_seqlen_q=3,
            max_seqlen_k=3, causal=True, dropout_p=dropout_p, dropout_seed=seed_tensor(1, "cpu"), return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, leaves((5, 2, 8), (7, 1, 8), (7, 1, 8)))


def test_gradients_of_some_inputs(device, dtype):
    """Each input alone gets the gradient that it gets among the others."""
    tensors = dict(zip("qkv", make_qkv(device, dtype, 1, 20, 25), strict=True))
    tensors |= {"bias": torch.randn(1, 2, 20, 25, device=device, dtype=dtype), "sink": torch.randn(2, device=device)}

    def gradients(names):
        used = {n: t.detach().clone().requires_grad_(n in names) for n, t in tensors.items()}
        flash_attention(**used, deterministic=True).square().sum().backward()
        assert all(used[n].grad is None for n in used.keys() - names)
        return {n: used[n].grad for n in names}

    whole = gradients(set(tensors))
    for name in tensors:
        assert torch.equal(gradients({name})[name], whole[name]), name


def test_lse_alone_has_gradients(device, dtype):
    q, k, v = (t.requires_grad_() for t in make_qkv(device, dtype, 1, 20, 25))
    _, lse = flash_attention(q, k, v, return_lse=True)
    lse.sum().backward()
    scores = torch.einsum("bihd,bjhd->bhij", q.detach().double(), k.detach().double()) * 32**-0.5
    p = scores.softmax(-1)
    want = torch.einsum("bhij,bjhd->bihd", p, k.detach().double()) * 32**-0.5
    torch.testing.assert_close(q.grad.double(), want, rtol=1e-2, atol=1e-2)
    assert (v.grad == 0).all()


def test_nothing_is_recorded_without_need(device, plain_dtype):
    q, k, v = make_qkv(device, plain_dtype, 1, 8, 8)
    assert flash_attention(q, k, v).grad_fn is None
    with torch.no_grad():
        assert flash_attention(q.requires_grad_(), k, v).grad_fn is None
    with torch.inference_mode():
        assert not flash_attention(q, k, v).requires_grad


def test_double_backward_raises(device, plain_dtype):
    q, k, v = (t.requires_grad_() for t in make_qkv(device, plain_dtype, 1, 8, 8))
    out = flash_attention(q, k, v)
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"DOUBLE_BACKWARD.*differentiable once.*eager"):
        dq.sum().backward()


@pytest.mark.parametrize("extras", [False, True])
def test_heads_before_rows(device, dtype, extras):
    """What the Transformers backend passes: the same bits as with rows before heads, and as strict about gradients."""
    tensors = dict(zip("qkv", make_qkv(device, dtype, 2, 20, 25, heads=4, heads_k=2), strict=True))
    options = {"deterministic": True, "return_lse": True, "key_range": int32([[1, 25], [0, 9]], device)}
    if extras:
        tensors |= {
            "bias": torch.randn(1, 4, 20, 25, device=device, dtype=dtype),
            "sink": torch.randn(4, device=device),
        }

    def results(heads_first):
        used = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        rows = [used[name].transpose(1, 2) if heads_first else used[name] for name in "qkv"]
        more = {name: used[name] for name in used.keys() - set("qkv")}
        out, lse = judged_attention(*rows, **more, **options, heads_first=heads_first)
        got = torch.autograd.grad(out.float().square().sum() + lse.sum(), used.values(), create_graph=True)
        with pytest.raises(NotImplementedError, match="DOUBLE_BACKWARD"):
            got[0].sum().backward()
        return out, lse, *got

    assert all(torch.equal(a, b) for a, b in zip(results(True), results(False), strict=True))
    with torch.no_grad():
        q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
        assert torch.equal(judged_attention(q, k, v, heads_first=True), judged_attention(*map(tensors.get, "qkv")))


def test_forward_mode_raises():
    """A tangent that is lost in silence would be a derivative of zero."""
    q, k, v = make_qkv("cpu", torch.float32, 1, 8, 8)

    def attend(q):
        return flash_attention(q, k, v)

    with torch.autograd.forward_ad.dual_level():
        for given in (q, q.clone().requires_grad_()):
            dual = torch.autograd.forward_ad.make_dual(given, torch.ones_like(q))
            with pytest.raises(NotImplementedError, match=r"FORWARD_MODE.*eager.*reverse mode"):
                attend(dual)
    for transform in (torch.func.jacfwd(attend), lambda q: torch.func.jvp(attend, (q,), (q,))):
        with pytest.raises(NotImplementedError, match=r"FORWARD_MODE|TORCH_FUNC"):
            transform(q)


def test_transforms_of_torch_func_raise():
    """Under vmap tensors require no gradient, so that of the outer call would be lost in silence."""
    q, k, v = make_qkv("cpu", torch.float32, 1, 8, 8)

    def attend(q):
        return flash_attention(q, k, v)

    stacked = torch.stack([q, q]).requires_grad_()
    for transform in (
        torch.func.vmap(attend),
        torch.func.grad(lambda x: attend(x[0]).sum()),
        torch.func.vmap(torch.func.grad(lambda x: attend(x).sum())),
        lambda x: torch.func.vjp(attend, x[0]),
    ):
        for given in (stacked, stacked.detach()):
            with pytest.raises(NotImplementedError, match=r"TORCH_FUNC.*eager.*torch\.autograd\.grad"):
                transform(given)


def test_gradients_of_several_outputs_at_once_raise():
    """torch.autograd.grad maps the backward alone then."""
    q, k, v = (t.requires_grad_() for t in make_qkv("cpu", torch.float32, 1, 8, 8))
    out = flash_attention(q, k, v)
    with pytest.raises(RuntimeError, match="hf_flash::backward"):
        torch.autograd.grad(out, (q, k, v), torch.randn(3, *out.shape), is_grads_batched=True)


def test_backward_twice_over_a_kept_graph(device, plain_dtype):
    q, k, v = (t.requires_grad_() for t in make_qkv(device, plain_dtype, 1, 20, 20))
    out = flash_attention(q, k, v, dropout_p=0.3, deterministic=True)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    again = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("changed", ["q", "k", "v", "bias", "mask", "dropout_seed", "key_range"])
def test_a_change_in_place_before_the_backward_raises(device, plain_dtype, changed):
    q, k, v = (t.requires_grad_() for t in make_qkv(device, plain_dtype, 1, 8, 8))
    tensors = {"q": q * 1, "k": k * 1, "v": v * 1, "dropout_seed": seed_tensor(1, device)}
    tensors["bias"] = torch.zeros(1, 1, 1, 8, device=device)
    tensors["mask"] = torch.ones(1, 1, 1, 8, device=device, dtype=torch.bool)
    tensors["key_range"] = int32([[0, 8]], device)
    out = flash_attention(**tensors, dropout_p=0.5)
    with torch.no_grad():
        tensors[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_dropout_mask(device, dtype, reentrant):
    """The recomputed forward draws the seed again from the restored generator."""

    def layers(q, k, v):
        hidden = flash_attention(q, k, v, dropout_p=0.3, deterministic=True)
        return flash_attention(hidden, k, v, dropout_p=0.3, causal=True, deterministic=True)

    def gradients(run):
        q, k, v = (t.requires_grad_() for t in make_qkv(device, dtype, 2, 30, 30))
        torch.manual_seed(5)
        out = run(q, k, v)
        out.float().square().sum().backward()
        return [out.detach(), q.grad, k.grad, v.grad]

    want = gradients(layers)
    got = gradients(lambda *qkv: checkpoint(layers, *qkv, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_autocast_leaves_the_operator_alone(device, plain_dtype):
    """Inputs decide the dtype; autocast casts what it lists, and this operator is not on its list."""
    q, k, v = make_qkv(device, plain_dtype, 1, 8, 8)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert flash_attention(q, k, v).dtype == plain_dtype
