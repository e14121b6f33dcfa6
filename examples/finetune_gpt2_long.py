"""Train a GPT-2 on Python's own sources, packed without padding, with hf_flash.

With no options: a byte-level BPE is trained on the standard library, a GPT-2 of modest size is built from a config, and
source files are packed into long rows by DataCollatorWithFlattening: one row of all tokens, with the boundaries of its
files beside it, so that no file sees its neighbour. It checks that a packed batch gives the loss that its files give
one by one, then trains and prints the loss and the tokens per second. Uses a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

from common import (
    UserError,
    autocast,
    first_line,
    make_trainer,
    mixed_precision,
    prepare_environment,
    python_sources,
    quiet,
    run,
    split_files,
    training_arguments,
)

PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)
DEFAULTS = {"steps": (20, 200), "max_length": (1024, 1024), "batch_size": (4, 16)}  # (CPU, GPU)
LOSS_LIMIT = {None: 1e-4, "bf16": 1e-2, "fp16": 2e-3}  # packed against one by one, relative, by autocast dtype


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def device_default(key: str) -> str:
        return "default: {} on the CPU, {} on a GPU".format(*DEFAULTS[key])

    add = parser.add_argument
    add("--model", help="hub name or folder of a pretrained causal LM with its tokenizer (default: a new GPT-2)")
    add("--layers", type=int, default=4, help="layers of the new GPT-2 (default: 4)")
    add("--hidden", type=int, default=256, help="hidden size of the new GPT-2, a multiple of 64 (default: 256)")
    add("--vocabulary", type=int, default=4096, help="tokens in the new tokenizer, 300 or more (default: 4096)")
    add("--files", type=int, default=200, help="source files to use, at most (default: 200)")
    add("--max-length", type=int, help=f"tokens of one piece of a file, at most ({device_default('max_length')})")
    add("--batch-size", type=int, help=f"pieces packed into one row ({device_default('batch_size')})")
    add("--steps", type=int, help=f"training steps ({device_default('steps')})")
    add("--learning-rate", type=float, default=1e-3, help="AdamW's peak learning rate (default: 1e-3)")
    add("--seed", type=int, default=0, help="seed of weights, order and dropout (default: 0)")
    add(
        "--output",
        type=Path,
        default=Path("outputs/finetune_gpt2_long"),
        help="folder for the model and metrics.json (default: outputs/finetune_gpt2_long)",
    )
    options = parser.parse_args()
    for name, least in (
        ("layers", 1),
        ("vocabulary", 300),
        ("files", 4),
        ("max_length", 8),
        ("batch_size", 1),
        ("steps", 1),
    ):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
    if options.hidden < 64 or options.hidden % 64:
        parser.error(f"--hidden is {options.hidden}; it must be a multiple of 64, the size of a head")
    return options


def train_tokenizer(texts: list[str], vocabulary: int):
    """A byte-level BPE in GPT-2's manner, learnt from `texts`; nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


def load_model(options: argparse.Namespace, texts: list[str]):
    """(model, tokenizer): those asked for with --model, or a new GPT-2 and a tokenizer learnt from the texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

    set_seed(options.seed)
    if options.model is None:
        tokenizer = train_tokenizer(texts, options.vocabulary)
        end = tokenizer.eos_token_id
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=options.max_length,
            n_embd=options.hidden,
            n_layer=options.layers,
            n_head=options.hidden // 64,
            bos_token_id=end,
            eos_token_id=end,
        )
        return GPT2LMHeadModel(config), tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model {options.model!r} could not be loaded as a causal language model ({first_line(error)}). Check "
            "the name at https://huggingface.co/models, or give a folder with config.json, weights and tokenizer"
        ) from error
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and options.max_length > limit:
        raise UserError(
            f"--max-length {options.max_length} is beyond the {limit} positions of {options.model!r}; give "
            f"{limit} or less"
        )
    return model, tokenizer


def cut(texts: list[str], tokenizer, max_length: int):
    """A data set of pieces (input_ids) of up to `max_length` tokens; tails of fewer than 8 tokens are dropped."""
    from datasets import Dataset

    rows = []
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        rows += [{"input_ids": ids[start : start + max_length]} for start in range(0, len(ids), max_length)]
    return Dataset.from_list([row for row in rows if len(row["input_ids"]) >= 8])


def check_packing(model, pieces, collator) -> tuple[float, float]:
    """(loss of the packed batch, loss of its pieces one by one weighted by predicted tokens), in eval mode."""
    import torch

    model.eval()
    batch = collator([dict(piece) for piece in pieces])
    packed = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    total = predicted = 0
    with torch.no_grad(), autocast():
        together = model(**packed, use_cache=False).loss.item()
        for piece in pieces:
            ids = torch.tensor([piece["input_ids"]], device=model.device)
            total += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * (ids.shape[1] - 1)
            predicted += ids.shape[1] - 1
    model.train()
    return together, total / predicted


def main() -> int:
    options = parse_arguments()
    prepare_environment(options.model)
    import torch
    from transformers import DataCollatorWithFlattening

    import hf_flash

    quiet()
    on_gpu = torch.cuda.is_available()
    for name, values in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, values[on_gpu])
    files = python_sources(*PACKAGES)
    random.Random(options.seed).shuffle(files)
    training, held_out = (
        [f.read_text("utf-8", errors="replace") for f in side]
        for side in split_files(files[: options.files], 0.1, options.seed)
    )
    model, tokenizer = load_model(options, training)
    model.to("cuda" if on_gpu else "cpu")
    pieces, unseen = (cut(texts, tokenizer, options.max_length) for texts in (training, held_out))
    tokens = sum(len(row["input_ids"]) for row in pieces)
    size = model.num_parameters() / 1e6
    print(f"model      {options.model or 'new GPT-2'}, {size:.1f} M parameters, {mixed_precision() or 'float32'}")
    print(f"data       {len(training)} files, {len(pieces)} pieces, {tokens:,} tokens; {len(held_out)} files held out")

    hf_flash.patch_model(model)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed, separate = check_packing(
        model, pieces.select(range(min(options.batch_size, len(pieces)))).to_list(), collator
    )
    print(f"\n{hf_flash.explain(model)}\n")
    difference, limit = abs(packed - separate) / separate, LOSS_LIMIT[mixed_precision()]
    passed = difference <= limit
    print(
        f"{'ok  ' if passed else 'FAIL'} packed loss {packed:.6f}, one by one {separate:.6f}: relative difference "
        f"{difference:.1e} (limit {limit:.0e})",
        flush=True,
    )

    args = training_arguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        logging_steps=1,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        warmup_steps=max(1, options.steps // 10),
        include_num_input_tokens_seen="all",
    )
    trainer = make_trainer(
        model, args, train_dataset=pieces, eval_dataset=unseen, data_collator=collator, processing_class=tokenizer
    )
    before = trainer.evaluate()["eval_loss"]
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    after = trainer.evaluate()["eval_loss"]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    speed = trainer.state.num_input_tokens_seen / seconds
    print(
        f"training loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; held-out loss "
        f"{before:.3f} before, {after:.3f} after (perplexity {math.exp(after):.0f}); {speed:,.0f} tokens/s"
    )

    hf_flash.unpatch_model(model)
    trainer.save_model(str(options.output / "model"))
    metrics = {
        "packed_loss": packed,
        "separate_loss": separate,
        "losses": losses,
        "held_out_before": before,
        "held_out_after": after,
        "tokens_per_second": speed,
    }
    (options.output / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print(f"model and metrics.json are in {options.output}")
    return 0 if passed else 1


if __name__ == "__main__":
    run(main)
