"""One measurement in a process of its own, so that its peak memory is nobody else's: python measure.py SPEC.json

finetune_bert_long.py writes the spec, starts this file once for each attention, and reads the JSON it writes to the
spec's "result". Task "steps" trains a few steps with dropout 0; task "lengths" times forward + backward by length.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from common import UserError, autocast, make_trainer, quiet, training_arguments

MIB = 2**20


def measure(spec: dict, folder: Path) -> dict:
    """Runs the spec in a fresh process and returns what it measured."""
    name = "-".join(str(spec[key]) for key in ("task", "attention", "precision"))
    spec_file, result_file = folder / f"{name}.spec.json", folder / f"{name}.json"
    result_file.unlink(missing_ok=True)
    spec_file.write_text(json.dumps({**spec, "result": str(result_file)}))
    code = subprocess.run([sys.executable, __file__, str(spec_file)]).returncode
    if code != 0:
        hint = (
            "killed, most likely for lack of memory: give a smaller batch or length"
            if code < 0
            else "see the error above"
        )
        raise UserError(f"measuring {spec['attention']} ({spec['task']}) ended with code {code}: {hint}")
    return json.loads(result_file.read_text())


def memory_mib() -> float:
    """Memory in use now: allocated on the GPU, or this process's resident set."""
    import psutil
    import torch

    used = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return used / MIB


def peak_memory_mib() -> float:
    """The most memory so far: allocated on the GPU, or this process's resident set (which includes torch itself)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage's mark survives exec, so a child would start from its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def clock() -> float:
    """Seconds, once the device has done all that was asked of it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def load(spec: dict, **options):
    """The model to measure. hf_flash starts from the model as it comes; the callback or patched() does the rest."""
    from transformers import AutoModelForSequenceClassification

    if spec["attention"] != "hf_flash":
        options["attn_implementation"] = spec["attention"]
    return AutoModelForSequenceClassification.from_pretrained(spec["model"], **options)


def without_dropout(path: str):
    """The config with every dropout probability 0, whatever the architecture calls it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith(("_drop", "pdrop"))):
            setattr(config, name, 0.0)
    return config


def step_timer():
    """A callback that keeps the seconds of every training step in `.seconds`."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.start = clock()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(clock() - self.start)

    return StepTimer()


def measure_steps(spec: dict) -> dict:
    """Loss of each training step with dropout 0, the median step time, and memory at rest and at its peak."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

    set_seed(spec["seed"])
    model = load(spec, config=without_dropout(spec["model"]))
    precision = {"bf16": False, "fp16": False} if spec["precision"] == "float32" else {}
    args = training_arguments(
        Path(spec["result"]).parent,
        max_steps=spec["steps"],
        per_device_train_batch_size=spec["batch"],
        logging_steps=1,
        learning_rate=spec["learning_rate"],
        warmup_steps=2,
        seed=spec["seed"],
        **precision,
    )
    timer = step_timer()
    callbacks = [timer]
    if spec["attention"] == "hf_flash":
        import hf_flash

        callbacks.append(hf_flash.FlashAttentionCallback())
    trainer = make_trainer(
        model,
        args,
        callbacks,
        spec["attention"],
        train_dataset=load_from_disk(spec["data"]),
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(spec["model"])),
    )
    rest = memory_mib()
    trainer.train()
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "step_seconds": statistics.median(timer.seconds[1:] or timer.seconds),
        "rest_mib": rest,
        "peak_mib": peak_memory_mib(),
    }


def one_pass(model, ids) -> float:
    """Seconds of one forward and backward pass over token ids (B, S)."""
    import torch

    start = clock()
    with autocast():
        loss = model(input_ids=ids, labels=torch.zeros(len(ids), dtype=torch.long, device=ids.device)).loss
    loss.backward()
    return clock() - start


def measure_lengths(spec: dict) -> dict:
    """Time and memory of forward + backward in train mode, with the model's own dropout, for each sequence length.

    The lengths go up: a process's high-water mark never falls, so what it says after a length belongs to that length.
    Where memory ends, the list ends.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(spec["seed"])
    model = load(spec).to(device).train()
    if spec["attention"] == "hf_flash":
        import hf_flash

        patched = hf_flash.patched(model)
    else:
        patched = nullcontext()
    result = {"lengths": [], "seconds": [], "peak_mib": [], "rest_mib": memory_mib()}
    with patched:
        for length in sorted(spec["lengths"]):
            ids = torch.randint(5, model.config.vocab_size, (spec["batch"], length), device=device)
            try:
                times = [one_pass(model, ids)]
                while len(times) < 4 and sum(times) < 2:
                    times.append(one_pass(model, ids))
            except torch.OutOfMemoryError:
                break
            result["lengths"].append(length)
            result["seconds"].append(min(times))
            result["peak_mib"].append(peak_memory_mib())
    return result


if __name__ == "__main__":
    quiet()
    order = json.loads(Path(sys.argv[1]).read_text())
    done = {"steps": measure_steps, "lengths": measure_lengths}[order["task"]](order)
    Path(order["result"]).write_text(json.dumps(done, indent=1))
