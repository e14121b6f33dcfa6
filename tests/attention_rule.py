"""The rule by which every result is judged, and what the tests of the operator share.

A result is right when its error against the float64 reference is at most twice the error of PyTorch's own attention in
the same dtype, plus two units in the last place of the largest reference value. The mean error obeys the same rule.
"""

import math

import torch

from hf_flash import flash_attention
from hf_flash.reference import reference_attention

DIFFERENTIABLE = ("bias", "sink")


def make_qkv(device, dtype, batch, seqlen_q, seqlen_k, heads=2, heads_k=None, head_dim=32, head_dim_v=None, seed=0):
    """q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) of normal values; batch None makes them packed (T, H, D)."""
    g = torch.Generator().manual_seed(seed)
    first = () if batch is None else (batch,)
    heads_k, head_dim_v = heads_k or heads, head_dim_v or head_dim
    shapes = (seqlen_q, heads, head_dim), (seqlen_k, heads_k, head_dim), (seqlen_k, heads_k, head_dim_v)
    return tuple(torch.randn(*first, *shape, generator=g).to(device, dtype) for shape in shapes)


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def poison_freed_memory():
    """What is allocated next holds NaN."""
    for _ in range(3):
        buffers = [torch.full((1 << n,), math.nan, device="cuda", dtype=torch.float16) for n in range(8, 25)]
        del buffers


def seed_tensor(value, device):
    return torch.tensor([value], dtype=torch.int64, device=device)


def random_like(t, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.device, dtype)


class Pass:
    """A forward pass and its graph, of which gradients are taken as often as one likes.

    precision None runs ``flash_attention``; a dtype runs the reference with it, on inputs of that dtype.
    """

    def __init__(self, q, k, v, options, precision=None):
        tensors = {"q": q, "k": k, "v": v} | {name: options[name] for name in DIFFERENTIABLE if name in options}
        wide = precision == torch.float64
        self.leaves = {n: (t.double() if wide else t).detach().requires_grad_() for n, t in tensors.items()}
        extras = {n: self.leaves.get(n, value) for n, value in options.items()}
        qkv = (self.leaves["q"], self.leaves["k"], self.leaves["v"])
        if precision is None:
            out, lse = flash_attention(*qkv, **extras, return_lse=True)
        else:
            extras.pop("deterministic", None)
            out, lse = reference_attention(*qkv, **extras, dtype=precision)
        self.graph = {"out": out, "lse": lse}
        self.results = {"out": out.detach(), "lse": lse.detach()}

    def gradients(self, dout, dlse=None):
        """By name: dq, dk, dv and, where present, dbias, dsink."""
        given = {"out": dout.to(self.graph["out"].dtype)}
        if dlse is not None:
            given["lse"] = dlse.to(self.graph["lse"].dtype)
        results, leaves = [self.graph[n] for n in given], list(self.leaves.values())
        grads = torch.autograd.grad(results, leaves, list(given.values()), retain_graph=True, materialize_grads=True)
        return {f"d{n}": g for n, g in zip(self.leaves, grads, strict=True)}


def run(q, k, v, options, *, dout=None, dlse=None, precision=None):
    """Results and gradients by name: out, lse, dq, dk, dv and, where present, dbias, dsink.

    dout and dlse are gradients, or functions that make them from out and lse; dout defaults to ones. precision: as in
    :class:`Pass`.
    """
    forward = Pass(q, k, v, options, precision)
    out, lse = forward.graph.values()
    dout = torch.ones_like(out) if dout is None else dout(out) if callable(dout) else dout
    return forward.results | forward.gradients(dout, dlse(lse) if callable(dlse) else dlse)


def dropped(seed, batch, heads, rows, cols, p, dtype, device, **options):
    """The forward's own mask, read off out, 256 keys at a time: q = 0 and v a slice of the unit matrix."""
    q = torch.zeros(batch, rows, heads, 64, device=device, dtype=dtype)
    k = torch.zeros(batch, cols, heads, 64, device=device, dtype=dtype)
    unit, parts = torch.eye(cols, device=device, dtype=dtype), []
    for part in unit.split(256, dim=1):
        v = torch.nn.functional.pad(part, (0, -part.shape[1] % 8))[None, :, None].expand(batch, -1, heads, -1)
        out = flash_attention(q, k, v, dropout_p=p, dropout_seed=seed.to(device), **options)
        parts.append(out[..., : part.shape[1]])
    return (torch.cat(parts, -1) != 0).transpose(1, 2)


def ulp(value, dtype):
    """The unit in the last place of a number in dtype."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value)) if value > 0 else 0.0


def largest(t):
    return t.abs().max().item() if t.numel() else 0.0


def judge(name, ours, reference, own, floor=0.0):
    """Raises AssertionError unless ours obeys the rule; minus infinity must stand where the reference has it."""
    assert ours.shape == reference.shape, f"{name} has shape {tuple(ours.shape)}, not {tuple(reference.shape)}"
    if ours.numel() == 0:
        return
    finite = reference.isfinite()
    wanted = torch.where(finite, reference, 0).abs()
    error, own_error = (torch.where(finite, x.double() - reference, 0).abs() for x in (ours, own))
    numbers = [error.max(), error.mean(), own_error.max(), own_error.mean(), wanted.max(), wanted.mean()]
    faults = [(ours.isfinite() != finite).any(), (~finite & (ours != reference)).any()]
    read = torch.stack(numbers + faults).tolist()  # at once: each reading waits for the GPU
    worst, mean, own_worst, own_mean, top, usual, *faults = read
    assert not faults[0], f"{name} is not finite where it should be, or the other way round"
    assert not faults[1], f"{name} has another infinity than the reference"
    top = max(1.0, top) if name == "lse" else top
    allowed = 2 * own_worst + 2 * ulp(top, ours.dtype) + floor
    if ours.dtype == torch.float64:
        allowed = 1e-12 * max(1.0, top)
    assert worst <= allowed, (
        f"{name}: error {worst:.3e}, allowed {allowed:.3e} (PyTorch's own {own_worst:.3e}, largest value {top:.3e})"
    )
    allowed_mean = 2 * own_mean + ulp(usual, ours.dtype) + floor
    assert mean <= max(allowed_mean, 1e-12), f"{name}: mean error {mean:.3e}, allowed {allowed_mean:.3e}"


def check(q, k, v, *, dout=None, lse_gradient=True, small=False, seed=1, **options):
    """Judge out, lse and every gradient of one call; returns our results by name.

    dout and dlse are random unless dout is given. With ``small`` PyTorch's own error has a floor under it
    (:func:`unavoidable`), for tensors so small that it can be zero by luck.
    """
    exact, plain = (Pass(q, k, v, options, precision) for precision in (torch.float64, q.dtype))
    dlse = random_like(exact.results["lse"], torch.float32, seed + 1) if lse_gradient else None
    dout = random_like(exact.results["out"], q.dtype, seed) if dout is None else dout
    ours = run(q, k, v, options, dout=dout, dlse=dlse)
    reference = exact.results | exact.gradients(dout, dlse)
    own = plain.results | plain.gradients(dout, dlse)
    floor = unavoidable(exact, plain, options, dout, dlse) if small else {}
    assert ours["out"].dtype == q.dtype and ours["dq"].dtype == q.dtype and ours["dk"].dtype == q.dtype
    for name, value in ours.items():
        judge(name, value, reference[name], own[name], floor.get(name, 0.0))
    return ours


def check_poison_outside_ranges(q, k, v, options):
    """Assert that NaN in q and dout outside query_range, and in k and v outside key_range, changes no bit of a result.

    dout is q. Without the NaN these rows hold zeros.
    """
    results = []
    for poison in (0.0, math.nan):
        inputs = [x.clone() for x in (q, k, v)]
        for x, name in zip(inputs, ("query_range", "key_range", "key_range"), strict=True):
            for row, (begin, end) in zip(x, options[name].tolist(), strict=True):
                row[:begin], row[end:] = poison, poison
        results.append(run(*inputs, options, dout=inputs[0].clone()))
    for name, clean in results[0].items():
        assert torch.equal(clean, results[1][name]), f"NaN outside the ranges changes {name}"
        assert name == "lse" or clean.isfinite().all()


def unavoidable(exact, plain, options, dout, dlse):
    """For each result, twice what the rounding of out and lse does to it, plus float32's own noise.

    exact and plain: the reference's :class:`Pass` in float64 and in q's dtype.

    A kernel that keeps out and lse and not the probabilities computes these again from the rounded lse, and reads each
    row's sum of dout * out off the rounded out. The error of lse scales the row's gradients, that of the sum acts as a
    gradient of lse does. PyTorch's own attention, which keeps the probabilities, is free of both: with one visible key
    its dq is exactly 0.

    The GPU's kernels round the probabilities before they multiply v, as PyTorch's own attention does, so there its out
    stands for the rounded one. Rounding errors of rows have no common sign: the floor is the largest of a few draws.
    """
    q, k, v = (plain.leaves[name].detach() for name in "qkv")
    out, lse = exact.results["out"], exact.results["lse"].nan_to_num(neginf=0.0)
    rounded_out = plain.results["out"] if q.is_cuda else out.to(q.dtype)
    error = (dout.double() * (rounded_out.double() - out)).sum(-1).mT
    eps, scale = torch.finfo(torch.float32).eps, options.get("scale") or q.shape[-1] ** -0.5
    score_noise = eps * scale * longest_row(q) * longest_row(k)
    relative = (lse.abs() * eps + score_noise) / 2
    extra, moved_out = 0 if dlse is None else dlse * relative, dout * relative.mT[..., None]
    rounded = {}
    for draw in range(4 if q.is_cuda else 1):
        sign = 1 if draw == 0 else random_like(error, torch.float64, draw).sign()
        for name, x in exact.gradients(moved_out, extra - sign * error).items():
            rounded[name] = torch.maximum(x.abs(), rounded.get(name, x.abs()))
    noise = 8 * eps * longest_row(dout) * longest_row(v) / (1 - options.get("dropout_p", 0.0))
    floors = {
        "dq": noise * scale * largest(k),
        "dk": noise * scale * largest(q),
        "dv": 0.0,
        "dbias": noise,
        "dsink": noise,
    }
    # Ours is a draw of its own beside those: three times the largest of them, where there are draws.
    times = 3 if q.is_cuda else 2
    floors = {name: times * largest(rounded[name]) + floor for name, floor in floors.items() if name in rounded}
    return floors | {"lse": score_noise, "out": score_noise * largest(out)}


def longest_row(t):
    """The largest Euclidean norm of a row of t, along its last dimension."""
    return largest(t.double().norm(dim=-1))


def visible_keys(seqlen_q, seqlen_k, offset, window, keys=None, rows=None):
    """For each query the set of keys it sees, written out from the contract's sentence."""
    key_begin, key_end = keys or (0, seqlen_k)
    row_begin, row_end = rows or (0, seqlen_q)
    left, right = (math.inf if side < 0 else side for side in window)

    def sees(i, j):
        return key_begin <= j < key_end and row_begin <= i < row_end and -left <= j - (i + offset) <= right

    return [{j for j in range(seqlen_k) if sees(i, j)} for i in range(seqlen_q)]
