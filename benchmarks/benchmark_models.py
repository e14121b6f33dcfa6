"""Time whole training steps of BERT-base and GPT-2 with eager, sdpa and hf_flash attention, on one GPU.

    python benchmarks/benchmark_models.py

Weights are random, which changes no time: bf16 autocast, dropout 0.1, AdamW. Lengths of a padded batch lie evenly
between half of S and S. The attentions take turns, each with a few steps in a row as a training loop has them, so that
a host that slows down or warms up does so for all; medians over the rounds. In brackets the time of the step's kernels
alone, which is less where the GPU waits for the host; peak memory of model, optimizer and step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, GPT2Config

import hf_flash

ATTENTIONS = ("eager", "sdpa", "hf_flash")
WARM_UP = 10  # steps; the host needs as many until its time no longer falls
STEPS_BEFORE, STEPS = 2, 4  # of a turn: untimed and timed
CELLS = (  # model, B, S, padded
    ("BERT-base", 32, 512, True),
    ("BERT-base", 8, 2048, True),
    ("GPT-2", 8, 1024, True),
    ("GPT-2", 2, 8192, False),
    ("GPT-2", 2, 8192, True),
)


def make_step(model_name: str, attention: str, batch: int, length: int, padded: bool):
    """A function that trains one step and returns nothing."""
    torch.manual_seed(0)
    if model_name == "BERT-base":
        config = BertConfig(max_position_embeddings=length)
        model = AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    else:
        config = GPT2Config(n_positions=length, use_cache=False)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(config.vocab_size, (batch, length), device="cuda")
    inputs = {"input_ids": tokens, "labels": tokens}
    if padded:
        lengths = torch.linspace(length // 2, length, batch, device="cuda").long()
        inputs["attention_mask"] = (torch.arange(length, device="cuda") < lengths[:, None]).long()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def milliseconds(step) -> float:
    """Of one of the steps in a row; those before them fill the memory cache again and keep the GPU at work."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.empty_cache()
    for _ in range(STEPS_BEFORE):
        step()
    start.record()
    for _ in range(STEPS):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / STEPS


def kernel_milliseconds(step) -> float:
    """What the GPU computes in a step, without its pauses."""
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in run.key_averages()) / 1000


def measure(cell: tuple, rounds: int) -> list[dict]:
    """Rows of a cell; an attention that finds no memory has None."""
    model, batch, length, padded = cell
    rows, steps = [], {}
    for attention in ATTENTIONS:
        rows.append({"model": model, "attention": attention, "B": batch, "S": length, "padded": padded})
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()
        try:
            step = make_step(model, attention, batch, length, padded)
            for _ in range(WARM_UP):
                step()
            kernels, peak = kernel_milliseconds(step), torch.cuda.max_memory_allocated() - others
            steps[attention] = step
            found = {"step_ms": None, "kernels_ms": round(kernels, 1), "peak_mib": round(peak / 2**20)}
        except torch.OutOfMemoryError:
            found = {"step_ms": None, "kernels_ms": None, "peak_mib": None}
        step = None
        rows[-1].update(found)
    times = {attention: [] for attention in steps}
    for _ in range(rounds):
        for attention in [name for name in times if times[name] is not None]:
            try:
                times[attention].append(milliseconds(steps[attention]))
            except torch.OutOfMemoryError:  # beside the others' models
                times[attention] = None
    for row in rows:
        if times.get(row["attention"]):
            row["step_ms"] = round(statistics.median(times[row["attention"]]), 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each attention (default 5)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder for steps.jsonl")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    command = "python " + " ".join(sys.argv)
    rows = [
        {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "hf_flash": hf_flash.__version__,
            "command": command,
        }
    ]
    print(f"{'model':10} {'B':>3} {'S':>6} padded  " + "".join(f"{name:>30}" for name in ATTENTIONS))
    options.output.mkdir(parents=True, exist_ok=True)
    for cell in CELLS:
        found = measure(cell, options.rounds)
        rows += found
        texts = [
            "out of memory"
            if row["step_ms"] is None
            else f"{row['step_ms']:.1f} ({row['kernels_ms']:.1f}) ms, {row['peak_mib']} MiB"
            for row in found
        ]
        model, batch, length, padded = cell
        print(f"{model:10} {batch:3} {length:6} {padded!s:6}  " + "".join(f"{text:>30}" for text in texts), flush=True)
        (options.output / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
