"""Tiny models of every architecture on the list, the same weights with eager attention and with hf_flash."""

import copy

import pytest
import torch
import transformers
from tiny_models import TINY


def available(name: str) -> bool:
    return hasattr(transformers, TINY[name].model_class)


def make(name: str, attention: str = "eager", device="cpu", dtype=torch.float32, **config):
    """The tiny model ``name``; the same weights on every call."""
    tiny = TINY[name]
    config = getattr(transformers, tiny.config_class)(**(tiny.config | config))
    config._attn_implementation = attention
    torch.manual_seed(1)
    model = getattr(transformers, tiny.model_class)(config)
    with torch.no_grad():  # initial weights are so small that attention would hardly matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(tiny.gain)
    return model.to(device=device, dtype=dtype).eval()


def make_batch(name: str, padding: str = "right", device="cpu", batch=3, length=13, seed=0):
    """Inputs of a training step. padding: "none", "right", "left" or "holes". Labels are -100 at padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    for b in range(1, batch):
        cut = length - 3 * b
        if padding == "right":
            mask[b, cut:] = 0
        elif padding == "left":
            mask[b, : length - cut] = 0
        elif padding == "holes":
            mask[b, b::4] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if padding == "none":
        del inputs["attention_mask"]
    labels = torch.randint(3, 61, (batch, length), generator=generator)
    if TINY[name].kind == "seq2seq":
        target = torch.ones(batch, length - 4, dtype=torch.long)
        target[1, -3:] = 0
        labels = labels[:, : length - 4].masked_fill(target == 0, -100)
        if padding != "none":
            inputs["decoder_attention_mask"] = target
        inputs["decoder_input_ids"] = torch.randint(3, 61, labels.shape, generator=generator)
    else:
        labels = labels.masked_fill(mask == 0, -100)
    inputs["labels"] = labels
    if TINY[name].kind == "decoder":  # the last padding token before a text would predict its first token
        first = mask.argmax(1, keepdim=True)
        inputs["labels"] = inputs["labels"].scatter(1, first, -100)
    return {key: value.to(device) for key, value in inputs.items()}


def twin(model):
    """A copy with hf_flash's attention."""
    import hf_flash

    return hf_flash.patch_model(copy.deepcopy(model), on_unsupported="error", on_fallback="error")


def step(model, inputs):
    """Logits at valid places, loss, and every parameter's gradient."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits[inputs["labels"] != -100].detach(), out.loss.detach(), grads


def assert_same_step(model, other, inputs, tolerance=2e-5):
    """Two models take the same training step: logits, loss, every gradient.

    A gradient's error is measured by its own largest value, or by the typical one where it is zero in exact arithmetic
    (a key bias shifts a whole row of scores).
    """
    (logits, loss, grads), (logits2, loss2, grads2) = step(model, inputs), step(other, inputs)
    assert (logits - logits2).abs().max() <= tolerance * logits.abs().max()
    assert abs(loss - loss2) <= tolerance * abs(loss)
    assert grads.keys() == grads2.keys()
    typical = max(grad.abs().max() for grad in grads.values()) * 1e-2
    for name, grad in grads.items():
        error, size = (grad - grads2[name]).abs().max(), torch.maximum(grad.abs().max(), typical)
        assert error <= 10 * tolerance * size, f"gradient of {name}: error {error:.2e} against {size:.2e}"


class Tools:
    """The functions of this file, for the tests."""

    models = TINY
    make = staticmethod(make)
    batch = staticmethod(make_batch)
    twin = staticmethod(twin)
    step = staticmethod(step)
    assert_same_step = staticmethod(assert_same_step)


@pytest.fixture
def tiny():
    return Tools
