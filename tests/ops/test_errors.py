"""Bad input raises with a sentence that names the argument, its value and what is allowed."""

import subprocess
import sys

import pytest
import torch
from attention_rule import int32, make_qkv

from hf_flash import flash_attention

DEVICE = "cpu"


def arguments(**changes):
    q, k, v = make_qkv(DEVICE, torch.float32, 2, 6, 9, heads=4, heads_k=2, head_dim=16)
    return {"q": q, "k": k, "v": v} | changes


def packed(**changes):
    q, k, v = make_qkv(DEVICE, torch.float32, None, 6, 9, heads=4, heads_k=2, head_dim=16)
    starts = {"cu_seqlens_q": int32([0, 2, 6], DEVICE), "cu_seqlens_k": int32([0, 4, 9], DEVICE)}
    return {"q": q, "k": k, "v": v, **starts, "max_seqlen_q": 4, "max_seqlen_k": 5} | changes


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# name -> arguments, the exception, what its sentence must contain: the argument, the value, what is allowed
BAD = {
    "q is no tensor": (arguments(q=[1.0]), TypeError, ["`q`", "list", "torch.Tensor"]),
    "q dims": (arguments(q=zeros(6, 4, 16)), ValueError, ["`q`", "(6, 4, 16)", "(B, S, H, D)", "cu_seqlens"]),
    "packed q dims": (packed(q=zeros(1, 6, 4, 16)), ValueError, ["`q`", "(1, 6, 4, 16)", "(T, H, D)"]),
    "dtype mix": (arguments(v=zeros(2, 9, 2, 16).half()), TypeError, ["`v`", "float16", "float32", "cast"]),
    "dtype": (
        {n: t.int() for n, t in arguments().items()}, NotImplementedError, ["DTYPE", "int32", "float16", "float32"]
    ),
    "complex": ({n: t.cfloat() for n, t in arguments().items()}, NotImplementedError, ["DTYPE", "complex64"]),
    "batch": (arguments(k=zeros(1, 9, 2, 16), v=zeros(1, 9, 2, 16)), ValueError, ["`k`", "1", "2", "expand"]),
    "k and v": (arguments(v=zeros(2, 8, 2, 16)), ValueError, ["`k`", "`v`", "(2, 9, 2, 16)", "(2, 8, 2, 16)"]),
    "head_dim of k": (arguments(k=zeros(2, 9, 2, 24)), ValueError, ["`k`", "24", "16", "equal"]),
    "heads": (
        arguments(k=zeros(2, 9, 3, 16), v=zeros(2, 9, 3, 16)), ValueError, ["4 heads", "multiple", "3 heads"]
    ),
    "head_dim 12": (
        arguments(q=zeros(2, 6, 4, 12), k=zeros(2, 9, 2, 12)), ValueError,
        ["HEAD_DIM", "`q`", "12", "multiple of 8", "256", "pad"],
    ),
    "head_dim 264": (
        arguments(q=zeros(2, 6, 4, 264), k=zeros(2, 9, 2, 264)), ValueError, ["HEAD_DIM", "264", "256"]
    ),
    "head_dim_v": (arguments(v=zeros(2, 9, 2, 20)), ValueError, ["HEAD_DIM", "`v`", "20", "multiple of 8"]),
    "device": (arguments(k=zeros(2, 9, 2, 16).to("meta")), ValueError, ["`k`", "meta", "cpu", "move"]),
    "dropout 1": (arguments(dropout_p=1.0), ValueError, ["`dropout_p`", "1.0", "less than 1"]),
    "dropout negative": (arguments(dropout_p=-0.1), ValueError, ["`dropout_p`", "-0.1", "at least 0"]),
    "dropout nan": (arguments(dropout_p=float("nan")), ValueError, ["`dropout_p`", "nan"]),
    "softcap": (arguments(softcap=-1.0), ValueError, ["`softcap`", "-1.0", "positive"]),
    "softcap nan": (arguments(softcap=float("nan")), ValueError, ["`softcap`", "nan", "positive and at most"]),
    "softcap inf": (arguments(softcap=float("inf")), ValueError, ["`softcap`", "inf", "positive and at most"]),
    "scale nan": (arguments(scale=float("nan")), ValueError, ["`scale`", "nan", "positive and at most"]),
    "scale inf": (arguments(scale=float("inf")), ValueError, ["`scale`", "inf", "positive and at most"]),
    "scale 1e39": (arguments(scale=1e39), ValueError, ["`scale`", "1e+39", "at most 3.4e+38"]),
    "scale": (arguments(scale=0.0), ValueError, ["`scale`", "0.0", "positive", "head_dim"]),
    "scale of a tensor": (arguments(scale=zeros().requires_grad_()), TypeError, ["`scale`", "tensor(0.", "gradient"]),
    "scale bool": (arguments(scale=True), TypeError, ["`scale` is True", "number"]),
    "softcap of a tensor": (arguments(softcap=torch.tensor(2.0)), TypeError, ["`softcap`", "tensor(2.)", "number"]),
    "softcap None": (arguments(softcap=None), TypeError, ["`softcap` is None", "number"]),
    "dropout string": (arguments(dropout_p="0.1"), TypeError, ["`dropout_p` is '0.1'", "number"]),
    "causal string": (arguments(causal="False"), TypeError, ["`causal` is 'False'", "True or False"]),
    "causal number": (arguments(causal=1), TypeError, ["`causal` is 1", "True or False"]),
    "deterministic string": (arguments(deterministic="no"), TypeError, ["`deterministic` is 'no'", "True or False"]),
    "return_lse string": (arguments(return_lse="no"), TypeError, ["`return_lse` is 'no'", "True or False"]),
    "slopes to train": (
        arguments(alibi_slopes=zeros(4).requires_grad_()), ValueError, ["`alibi_slopes`", "no gradient", "detach"]
    ),
    "cu_seqlens list": (packed(cu_seqlens_q=[0, 2, 6]), TypeError, ["`cu_seqlens_q`", "list", "torch.Tensor"]),
    "window": (arguments(window=(-2, 0)), ValueError, ["`window`", "(-2, 0)", "-1"]),
    "window of halves": (arguments(window=(2.5, 0)), TypeError, ["`window`", "(2.5, 0)", "integers", "-1"]),
    "window of None": (arguments(window=(None, 0)), TypeError, ["`window`", "(None, 0)", "integers"]),
    "window of bools": (arguments(window=(True, 0)), TypeError, ["`window`", "(True, 0)", "integers"]),
    "window type": (arguments(window=5), TypeError, ["`window`", "5", "(left, right)"]),
    "bias shape": (arguments(bias=zeros(1, 4, 6, 8)), ValueError, ["`bias`", "(1, 4, 6, 8)", "(2, 4, 6, 9)"]),
    "bias dims": (arguments(bias=zeros(1, 1, 1, 6, 9)), ValueError, ["`bias`", "(1, 1, 1, 6, 9)"]),
    "bias dtype": (
        arguments(bias=zeros(1, 1, 6, 9, dtype=torch.float64)), TypeError, ["`bias`", "float64", "float32"]
    ),
    "bool bias": (arguments(bias=zeros(6, 9).bool()), TypeError, ["`bias`", "bool", "`mask`"]),
    "float mask": (arguments(mask=zeros(6, 9)), TypeError, ["`mask`", "float32", "bool", "`bias`"]),
    "mask shape": (arguments(mask=zeros(6, 6).bool()), ValueError, ["`mask`", "(6, 6)", "(2, 4, 6, 9)"]),
    "slopes": (arguments(alibi_slopes=zeros(3)), ValueError, ["`alibi_slopes`", "(3,)", "(4,)", "(2, 4)"]),
    "slopes dtype": (arguments(alibi_slopes=zeros(4).half()), TypeError, ["`alibi_slopes`", "float16", "float32"]),
    "sink": (arguments(sink=zeros(2)), ValueError, ["`sink`", "(2,)", "(4,)"]),
    "key_range shape": (arguments(key_range=int32([0, 9], "cpu")), ValueError, ["`key_range`", "(2,)", "(2, 2)"]),
    "key_range dtype": (
        arguments(key_range=torch.tensor([[0, 9], [0, 9]])), TypeError, ["`key_range`", "int64", "int32"]
    ),
    "query_range": (arguments(query_range=zeros(2, 2)), TypeError, ["`query_range`", "float32", "int32"]),
    "query_offset": (arguments(query_offset=int32([1], "cpu")), ValueError, ["`query_offset`", "(1,)", "(2,)"]),
    "seed dtype": (
        arguments(dropout_p=0.1, dropout_seed=int32([1], "cpu")), TypeError, ["`dropout_seed`", "int32", "int64"]
    ),
    "seed int": (arguments(dropout_p=0.1, dropout_seed=3), TypeError, ["`dropout_seed`", "int", "torch.Tensor"]),
    "one cu_seqlens": (packed(cu_seqlens_k=None), ValueError, ["`cu_seqlens_q`", "`cu_seqlens_k`", "go together"]),
    "cu_seqlens int64": (
        packed(cu_seqlens_q=torch.tensor([0, 2, 6])), TypeError, ["`cu_seqlens_q`", "int64", "int32"]
    ),
    "cu_seqlens count": (
        packed(cu_seqlens_k=int32([0, 9], "cpu")), ValueError, ["`cu_seqlens_k`", "(2,)", "(3,)"]
    ),
    "cu_seqlens dims": (packed(cu_seqlens_q=int32([[0, 2, 6]], "cpu")), ValueError, ["`cu_seqlens_q`", "(B + 1,)"]),
    "ranges packed": (
        packed(key_range=int32([[0, 1], [0, 1]], "cpu")), ValueError, ["`key_range`", "`cu_seqlens_q`", "shorten"]
    ),
    "max_seqlen alone": (arguments(max_seqlen_q=4), ValueError, ["`max_seqlen_q` is 4", "cu_seqlens", "leave it out"]),
    "max_seqlen beside a mask": (
        arguments(mask=zeros(6, 9).bool(), max_seqlen_k=4), ValueError, ["`max_seqlen_k` is 4", "cu_seqlens"]
    ),
    "max_seqlen negative": (packed(max_seqlen_k=-4), ValueError, ["`max_seqlen_k` is -4", "at least 0"]),
    "max_seqlen float": (packed(max_seqlen_q=4.0), TypeError, ["`max_seqlen_q` is 4.0", "int or None"]),
    "max_seqlen bool": (packed(max_seqlen_q=True), TypeError, ["`max_seqlen_q` is True", "int or None"]),
    "max_seqlen tensor": (
        packed(max_seqlen_k=torch.tensor(5)), TypeError, ["`max_seqlen_k` is tensor(5)", "int or None"]
    ),
    "packed bias": (
        packed(bias=zeros(1, 1, 4, 5), max_seqlen_q=None), ValueError, ["`bias`", "`max_seqlen_q`", "pass both"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_the_sentence(name):
    bad, error, words = BAD[name]
    with pytest.raises(error, match="hf_flash") as caught:
        flash_attention(**bad)
    sentence = str(caught.value)
    for word in words:
        assert word in sentence, f"{word!r} is not in: {sentence}"


def test_the_bindings_repeat_what_protects_memory():
    """The raw operators, called without the checks of Python."""
    q, k, v = make_qkv("cpu", torch.float32, 2, 6, 9, heads=4, heads_k=2, head_dim=16)
    good = {"dropout_keep": 256, "cu": None, "bias": None, "ranges": None, "sink": None}

    def call(q=q, k=k, v=v, **changes):
        a = good | changes
        return torch.ops.hf_flash.forward(
            q, k, v, 0.25, dropout_keep=a["dropout_keep"], max_seqlen_q=4, max_seqlen_k=4, key_range=a["ranges"],
            cu_seqlens_q=a["cu"], cu_seqlens_k=a["cu"], bias=a["bias"], sink=a["sink"],
        )  # fmt: skip

    call()
    assert torch.ops.hf_flash.row_sum(q, q, None).shape == (2, 4, 6)
    for dout in (q[:1], q.reshape(12, 1, 4, 16), q.flatten(0, 1)):
        with pytest.raises(RuntimeError, match="must have out's shape"):
            torch.ops.hf_flash.row_sum(dout, q, None)
    for changes in (
        {"k": k[:1]}, {"v": v[:, :5]}, {"k": k.double()}, {"q": q[..., :12]}, {"bias": zeros(1, 1, 6, 7)},
        {"ranges": int32([[0, 1]], "cpu")}, {"ranges": torch.zeros(2, 2, dtype=torch.int64)}, {"sink": zeros(3)},
        {"cu": int32([0, 6], "cpu")}, {"dropout_keep": 0}, {"dropout_keep": 257},
        {"k": k[:, :, :1].expand(2, 9, 3, 16)},
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            call(**changes)


CHECKED = """
import sys, torch
from hf_flash import flash_attention
from hf_flash.attention import judged_attention
def int32(values): return torch.tensor(values, dtype=torch.int32)
def call(packed, function=flash_attention, **options):
    shape = (6, 2, 8) if packed else (2, 6, 2, 8)
    q = torch.randn(shape)
    try:
        function(q, q, q, **options)
    except ValueError as error:
        return str(error)
    return "passed"
def starts(*values, longest=4): return dict(packed=True, cu_seqlens_q=int32(values), cu_seqlens_k=int32([0, 3, 6]),
                                            max_seqlen_q=longest, max_seqlen_k=4)
print(call(False, key_range=int32([[0, 6], [2, 7]])))
print(call(False, query_range=int32([[4, 2], [0, 6]])))
print(call(**starts(0, 5, 3)))
print(call(**starts(0, 3, 9)))
print(call(**starts(1, 3, 6)))
print(call(**starts(0, 5, 6)))
print(call(**starts(0, 3, 6)))
print(call(False, key_range=int32([[0, 6], [2, 2]])))
for end in (2, 3):
    print(call(False, judged_attention, heads_first=True, key_range=int32([[0, 2], [1, end]])))
"""


def test_hf_flash_check_reads_values_back(monkeypatch):
    monkeypatch.setenv("HF_FLASH_CHECK", "1")
    done = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    wanted = [
        ("`key_range`[1] is (2, 7)", "<= 6"),
        ("`query_range`[0] is (4, 2)", "begin <= end"),
        ("`cu_seqlens_q` is [0, 5, 3]", "never decrease"),
        ("`cu_seqlens_q` is [0, 3, 9]", "not exceed 6"),
        ("`cu_seqlens_q` is [1, 3, 6]", "start at 0"),
        ("`max_seqlen_q` is 4", "5 rows"),
        ("passed",),
        ("passed",),
        ("passed",),
        ("`key_range`[1] is (1, 3)", "<= 2"),
    ]
    for sentence, words in zip(said, wanted, strict=True):
        assert all(word in sentence for word in words), sentence
