"""Logits of a saved model with Transformers alone: python plain_reload.py MODEL INPUTS.npz LOGITS.npy

It runs in a fresh process and shows that a model trained with hf_flash needs nothing of hf_flash to be used.
"""

from __future__ import annotations

import sys

import numpy
import torch
from transformers import AutoModelForSequenceClassification


def main(model_path: str, inputs_path: str, logits_path: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(model_path).to(device).eval()
    inputs = {name: torch.from_numpy(value).to(device) for name, value in numpy.load(inputs_path).items()}
    with torch.no_grad():
        logits = model(**inputs).logits.float().cpu().numpy()
    assert "hf_flash" not in sys.modules, "this process was to show Transformers alone"
    numpy.save(logits_path, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
