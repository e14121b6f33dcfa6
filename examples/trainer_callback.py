"""The shortest full example: Trainer with FlashAttentionCallback, nothing else changed.

A small BERT learns to tell texts that Python's email package holds from those of asyncio.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import prepare_environment, python_sources, quiet, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="training steps (default: 30)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/trainer_callback"),
        help="folder for the model (default: outputs/trainer_callback)",
    )
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be 1 or more")
    prepare_environment()

    import torch
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

    import hf_flash

    quiet()
    set_seed(0)
    rows = []
    for label, package in enumerate(("asyncio", "email")):
        for file in python_sources(package):
            text = file.read_bytes()  # the tokens are the bytes
            rows += [{"input_ids": list(text[i : i + 256]), "label": label} for i in range(0, len(text) - 255, 4096)]

    config = BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(
            str(options.output),
            max_steps=options.steps,
            learning_rate=1e-3,
            logging_steps=5,
            report_to="none",
            save_strategy="no",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(rows).shuffle(seed=0),
        callbacks=[hf_flash.FlashAttentionCallback()],
    )
    trainer.train()
    print(hf_flash.explain(trainer.model))
    trainer.save_model(str(options.output / "model"))
    return 0


if __name__ == "__main__":
    run(main)
