"""finetune_bert_long.py from end to end on a tiny model, what it says to wrong input, how it stretches positions."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def examples(monkeypatch):
    """Makes the modules beside the scripts importable."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def call(examples, monkeypatch, capsys):
    """call(*options) -> what finetune_bert_long.py writes to stderr before it leaves with code 2, in this process."""

    def call(*options):
        import common
        import datasets
        import finetune_bert_long
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(common, "prepare_environment", lambda *names: None)
        monkeypatch.setattr(finetune_bert_long, "prepare_environment", lambda *names: None)
        monkeypatch.setattr(sys, "argv", ["finetune_bert_long.py", *map(str, options)])
        with pytest.raises(SystemExit) as left:
            common.run(finetune_bert_long.main)
        assert left.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.mark.architectures("default")
def test_end_to_end(run_example, tiny_bert, tmp_path, device):
    """Every part of the demo, on real files, in a few steps."""
    precision = _precision(device)
    out = run_example(
        "finetune_bert_long.py", "--model", tiny_bert, "--positions", 256, "--max-length", 192, "--steps", 6,
        "--windows", 8, "--held-out-windows", 2, "--lengths", 64, 256, "--compare-steps", 10, "--output", tmp_path,
        device=device,
    ).stdout  # fmt: skip
    assert "positions stretched from 64 to 256" in out
    assert re.search(r"2 patched; 100\.0% of \d+ attention calls served", out)
    assert ("device     CPU" in out) == (device == "cpu")
    assert out.count("\nok   ") == 3 and "all checks passed" in out
    assert 0 <= float(re.search(r"held-out accuracy ([\d.]+)% before", out)[1]) <= 100
    assert (tmp_path / "finetune_bert_long.png").read_bytes().startswith(b"\x89PNG")

    flash, eager = (
        json.loads((tmp_path / "work" / f"steps-{name}-{precision}.json").read_text()) for name in ("hf_flash", "eager")
    )
    assert len(flash["losses"]) == len(eager["losses"]) == 10
    assert flash["losses"] == pytest.approx(eager["losses"], rel=1e-3 if precision == "float32" else 2e-2)
    assert 0 < flash["step_seconds"] < 60 and flash["peak_mib"] > flash["rest_mib"] > 0
    lengths = json.loads((tmp_path / "work" / f"lengths-hf_flash-{precision}.json").read_text())
    assert lengths["lengths"] == [64, 256] and lengths["peak_mib"][0] <= lengths["peak_mib"][1]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == 256 and "hf_flash" not in json.dumps(config)


def _precision(device):
    return "float32" if device == "cpu" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"


def test_a_difference_fails(examples, capsys):
    from compare import loss_distance, verdict

    assert verdict("same", loss_distance([2.0, 1.0], [2.0, 1.0]), 1e-3)
    assert not verdict("off", loss_distance([2.0, 1.0], [2.0, 1.01]), 1e-3)
    assert not verdict("nan", loss_distance([2.0, float("nan")], [2.0, 1.0]), 1e-3)
    assert capsys.readouterr().out.count("FAIL") == 2


def test_help(run_example):
    out = run_example("finetune_bert_long.py", "--help").stdout
    for option in ("--model", "--dataset", "--max-length", "--positions", "--output", "--compare"):
        assert option in out


def test_wrong_options(call, tiny_bert, tmp_path):
    out = ("--output", tmp_path)
    assert "--steps is 0" in call("--steps", 0, *out)
    assert "--model 'no/such-model' could not be loaded" in call("--model", "no/such-model", *out)
    error = call("--model", tiny_bert, "--positions", 128, "--max-length", 500, "--lengths", 64, *out)
    assert "--max-length 500 is beyond the 128 positions" in error and "--positions 500" in error
    assert "--dataset 'no/such-data'" in call("--dataset", "no/such-data", *out)


@pytest.mark.parametrize(
    "rows, options, error",
    [
        ([], (), "is no data set|is empty"),
        ([{"text": "", "label": label} for label in "abababab"], (), "no row is left"),
        ([{"text": "a b", "label": "x"}, {"text": "c", "label": "x"}], (), "holds 1 class"),
        ([{"body": "a b", "label": "x"}], (), "say with --text-column which column to use: body, label"),
        ([{"text": "a b", "label": "x"}], ("--label-column", "kind"), "has no column 'kind'"),
    ],
)
def test_wrong_data(call, tmp_path, rows, options, error):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    message = call("--dataset", file, *options, "--output", tmp_path / "out")
    assert re.search(error, message), message


def test_own_data_set(examples, tmp_path):
    from long_documents import load_any

    rows = [{"content": f"text {i}", "category": "ab"[i % 2]} for i in range(20)]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    train, held_out = load_any(str(file), None, None, 0)
    assert train.features["label"].names == ["a", "b"] and len(train) + len(held_out) == 20
    assert not set(train["text"]) & set(held_out["text"])
    assert all(row["label"] == int(row["text"].split()[1]) % 2 for row in train)


def test_standard_library_is_split_by_file_and_balanced(examples, tiny_bert):
    from long_documents import FAMILIES, cut_windows, standard_library
    from transformers import AutoTokenizer

    train, held_out = standard_library(0)
    assert set(train["label"]) == set(held_out["label"]) == set(range(len(FAMILIES)))
    assert not set(train["file"]) & set(held_out["file"])
    windows = cut_windows(train, AutoTokenizer.from_pretrained(tiny_bert), 128, 5, 0)
    assert sorted(windows["label"]) == [label for label in range(len(FAMILIES)) for _ in range(5)]
    assert max(map(len, windows["input_ids"])) == 128


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_stretched_positions_keep_short_inputs(examples, kind):
    from stretch import longest_input, position_table, reserved_rows, stretch_positions
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(kind, vocab_size=50, max_position_embeddings=34, pad_token_id=1, **sizes)
    ).eval()
    before, limit = position_table(model)[1].weight.detach(), longest_input(model)
    ids = torch.randint(5, 50, (1, 20))
    longer = stretch_positions(model, 100)
    first = reserved_rows(position_table(longer)[1])
    table = position_table(longer)[1].weight
    assert longest_input(longer) == 100 and table.shape[0] == 100 + first
    assert torch.equal(table[: before.shape[0]], before)
    assert torch.equal(table[before.shape[0]], before[first + 1])  # the repeats start behind the first token's row
    torch.testing.assert_close(longer(ids).logits, model(ids).logits)
    assert longer(torch.randint(5, 50, (1, 100))).logits.isfinite().all()
    assert stretch_positions(longer, limit) is longer


def test_no_table_to_stretch(examples):
    from common import UserError
    from stretch import stretch_positions
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"takes up to 64 tokens .* give --positions 64"):
        stretch_positions(LlamaForSequenceClassification(config), 128)
