"""FlashAttentionCallback in a real Trainer."""

import pytest
import torch
import transformers

import hf_flash


class Data(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.batch.items()}


def trainer(tiny, tmp_path, callbacks, model=None, name="bert", batch=None, collator=None, **arguments):
    model = tiny.make(name) if model is None else model
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=3, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=1, save_strategy="no", seed=7, learning_rate=1e-3, **arguments,
    )  # fmt: skip
    data = Data(tiny.batch(name) if batch is None else batch)
    return transformers.Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks, data_collator=collator
    )


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_training_equals_eager(tiny, tmp_path, arguments):
    plain = trainer(tiny, tmp_path, [], **arguments)
    callback = hf_flash.FlashAttentionCallback(on_fallback="error", on_unsupported="error")
    ours = trainer(tiny, tmp_path, [callback], **arguments)
    assert hf_flash.is_patched(ours.model)
    plain.train()
    ours.train()
    assert hf_flash.is_patched(ours.model) and callback.report().share == 1.0
    tolerance = 2e-2 if "bf16" in arguments else 1e-3
    assert losses(ours) == pytest.approx(losses(plain), rel=tolerance) and len(losses(ours)) == 3
    ours.train()  # again: nothing breaks
    ours.save_model(tmp_path / "saved")
    saved = transformers.BertForMaskedLM.from_pretrained(tmp_path / "saved")
    assert saved.state_dict().keys() == plain.model.state_dict().keys()
    callback.restore()
    assert not hf_flash.is_patched(ours.model)


def test_restores_at_the_end_if_asked(tiny, tmp_path):
    callback = hf_flash.FlashAttentionCallback(restore_on_train_end=True)
    ours = trainer(tiny, tmp_path, [callback])
    config = tiny.make("bert").config.to_dict()
    assert callback.report().share is None
    ours.train()
    assert not hf_flash.is_patched(ours.model) and ours.model.config.to_dict().keys() == config.keys()
    assert callback.report().share == 1.0 and {row.status for row in callback.report().rows} == {"patched"}
    ours.train()
    assert len(losses(ours)) >= 3


def test_added_later_and_on_a_model_that_the_user_patched(tiny, tmp_path):
    ours = trainer(tiny, tmp_path, [])
    ours.add_callback(hf_flash.FlashAttentionCallback())
    ours.train()
    assert hf_flash.is_patched(ours.model)
    model = hf_flash.patch_model(tiny.make("bert"))
    callback = hf_flash.FlashAttentionCallback(restore_on_train_end=True)
    trainer(tiny, tmp_path, [callback], model=model).train()
    assert hf_flash.is_patched(model)  # the user's patch is the user's to end
    assert callback.report().share == 1.0


def test_arguments_are_used_or_told(tiny, tmp_path, caplog):
    """attn_implementation="hf_flash" is no patch of the user's; patch_model is, and its arguments stay."""
    callback = hf_flash.FlashAttentionCallback(padding_free=True, on_fallback="error", restore_on_train_end=True)
    model = tiny.make("bert", "hf_flash")
    ours = trainer(tiny, tmp_path, [callback], model=model)
    assert "PaddingFree" in str(type(model.bert.encoder).__mro__)
    ours.train()
    assert callback.report().share == 1.0 and model.config._attn_implementation == "hf_flash"
    assert "PaddingFree" not in str(type(model.bert.encoder).__mro__)
    model = hf_flash.patch_model(tiny.make("bert"))
    trainer(tiny, tmp_path, [hf_flash.FlashAttentionCallback(padding_free=True)], model=model)
    assert "arguments (padding_free) are not used" in caplog.text


def test_an_exception_leaves_a_way_back(tiny, tmp_path):
    callback = hf_flash.FlashAttentionCallback(restore_on_train_end=True)
    batch = tiny.batch("bert")
    batch["labels"] = batch["labels"].clamp(min=-100) * 0 + 10**6  # beyond the vocabulary
    ours = trainer(tiny, tmp_path, [callback], batch=batch)
    with pytest.raises((IndexError, RuntimeError)):
        ours.train()
    assert hf_flash.is_patched(ours.model)
    callback.restore()
    assert not hf_flash.is_patched(ours.model)


def test_packed_by_the_collator(tiny, tmp_path):
    batch = {"input_ids": [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]]}
    batch["labels"] = [list(ids) for ids in batch["input_ids"]]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    callback = hf_flash.FlashAttentionCallback(on_fallback="error")
    ours = trainer(tiny, tmp_path, [callback], name="gpt2", batch=batch, collator=collator)
    ours.train()
    assert callback.report().share == 1.0 and len(losses(ours)) == 3


def test_arguments_are_checked_when_it_is_made():
    for arguments, error in (
        ({"restore_on_train_end": "False"}, TypeError), ({"fp": "x"}, TypeError), ({"fp32": "x"}, ValueError),
        ({"padding_free": 1}, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=next(iter(arguments))):
            hf_flash.FlashAttentionCallback(**arguments)
