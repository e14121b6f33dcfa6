"""What the examples share: errors for the user, the environment, Python's own sources as text, progress and memory."""

from __future__ import annotations

import os
import random
import sys
import sysconfig
from pathlib import Path


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def run(main) -> None:
    """Calls `main()` and leaves the process: 0, or 2 with one line for a UserError, or 1 for a failed check."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def prepare_environment(*names: str | None) -> None:
    """Sets what has to stand before torch and transformers are imported.

    `names` are the model and data set that the user asked for. With none but local paths among them nothing may reach
    for a hub. One process drives one GPU: Trainer would otherwise wrap the model in nn.DataParallel; for several GPUs
    start the script with torchrun.
    """
    if all(name is None or Path(name).exists() for name in names):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the bars for loading weights, too
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def quiet() -> None:
    """Leaves the errors of Transformers alone, without load reports (a fresh classifier is meant to be fresh)."""
    import transformers

    transformers.utils.logging.set_verbosity_error()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages that quote a library's."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def python_sources(*packages: str) -> list[Path]:
    """The .py files of packages of Python's standard library, tests left out, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for package in packages:
        found = [root / package] if package.endswith(".py") else (root / package).rglob("*.py")
        files += [f for f in found if f.is_file() and not {"test", "tests"} & set(f.relative_to(root).parts)]
    return sorted(files)


def split_files(files: list[Path], held_out: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Files for training and files held out (at least one of each): no text of one file is on both sides."""
    files = list(files)
    random.Random(seed).shuffle(files)
    cut = min(max(1, round(len(files) * held_out)), len(files) - 1)
    return files[cut:], files[:cut]


def mixed_precision() -> str | None:
    """The autocast dtype to train with: bf16 on GPUs that have it, fp16 on older ones, None (float32) on the CPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(enabled: bool = True):
    """The context that Trainer runs a model in on this machine, for a forward pass outside Trainer."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision())
    return torch.autocast(
        "cuda" if dtype else "cpu", dtype=dtype or torch.bfloat16, enabled=enabled and dtype is not None
    )


def training_arguments(output: Path, **options):
    """TrainingArguments for this machine: float32 on the CPU, bf16 or fp16 autocast on a GPU, nothing sent anywhere."""
    import torch
    from transformers import TrainingArguments

    precision = mixed_precision()
    defaults = {
        "output_dir": str(output),
        "report_to": "none",
        "save_strategy": "no",
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(**{**defaults, **options})


def progress_callback(name: str):
    """Trainer's progress bar with `name` before and the loss behind it, in place of one printed line for each log."""
    from transformers import ProgressCallback

    class LossBar(ProgressCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:
                self.training_bar.set_description(name)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
                self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    return LossBar()


def make_trainer(model, args, callbacks=(), name="training", **options):
    """A Trainer with `callbacks` present from its start (a later add_callback misses on_init_end) and the loss bar."""
    from transformers import PrinterCallback, Trainer

    args.disable_tqdm = True  # swaps Trainer's own bar, which prints every log, for PrinterCallback, removed below
    trainer = Trainer(model=model, args=args, callbacks=[progress_callback(name), *callbacks], **options)
    trainer.remove_callback(PrinterCallback)
    return trainer
