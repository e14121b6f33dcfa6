"""Gradients of whole models in bfloat16, parameter by parameter, beside those that PyTorch's own attention gives."""

import copy

import pytest
import torch

import hf_flash

pytestmark = pytest.mark.gpu


def make_bert(transformers, length):
    """BERT-base's sizes, a padded batch of two."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(attn_implementation="eager"))
    ids = torch.randint(1000, 30000, (2, length))
    mask = torch.arange(length) < torch.tensor([[length], [length * 5 // 8]])
    labels = ids.masked_fill(~mask, -100)
    return model, {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels}


def make_gpt2(transformers, length):
    """GPT-2's sizes, two full rows."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_implementation="eager"))
    ids = torch.randint(0, 50000, (2, length))
    return model, {"input_ids": ids, "labels": ids}


def gradients(model, batch):
    """Every parameter's gradient in float32."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def problem(kind, device, length=512):
    """(model in bfloat16, batch, the float32 model's gradients, those of the model with sdpa). No dropout.

    The float32 model has weights that bfloat16 holds exactly, so that every difference is one of computation.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    with torch.device(device):
        model, batch = {"bert": make_bert, "gpt2": make_gpt2}[kind](transformers, length)
    half = model.eval().to(torch.bfloat16)
    reference = gradients(copy.deepcopy(half).float(), batch)
    torch_attention = copy.deepcopy(half)
    torch_attention.set_attn_implementation("sdpa")
    return half, batch, reference, gradients(torch_attention, batch)


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def cuda_problem(request):
    return problem(request.param, "cuda")


def relative_errors(found, reference):
    """Frobenius norm of each gradient's error, by the gradient's own norm.

    A key bias adds one number to all scores of a row, which the softmax takes out again: its gradient is zero in exact
    arithmetic and rounding in every other. It counts by the norm of its layer's query bias.
    """
    norms = {name: reference[name.replace(".key.bias", ".query.bias")].norm().item() for name in reference}
    return {name: (found[name] - reference[name]).norm().item() / norms[name] for name in reference}


def assert_as_good_as_torch(half, batch, reference, own):
    ours = hf_flash.patch_model(copy.deepcopy(half), on_unsupported="error", on_fallback="error")
    found = gradients(ours, batch)
    assert hf_flash.explain(ours).share == 1.0
    assert found.keys() == own.keys() == reference.keys() and len(found) > 140
    errors, own_errors = relative_errors(found, reference), relative_errors(own, reference)
    worse = {}
    for name, error in errors.items():
        # 2^-8 is bfloat16's own step: half a step of the query bias's size is nothing for a gradient of zero.
        floor = 2**-9 if name.endswith(".key.bias") else 2**-12
        if not error <= 1.5 * own_errors[name] + floor:
            worse[name] = f"{error:.2e} against {own_errors[name]:.2e}"
    assert not worse, worse


def test_gradients_are_as_good_as_with_torchs_attention(cuda_problem):
    assert_as_good_as_torch(*cuda_problem)
