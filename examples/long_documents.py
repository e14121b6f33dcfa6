"""Labelled long documents for finetune_bert_long.py: Python's own standard library, or any data set with labels."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

from common import UserError, first_line, python_sources, split_files

# Which part of the standard library does a text come from? Parts that every Python since 3.10 has, of 150 kB and more.
FAMILIES = {
    "asyncio": ("asyncio",),
    "email": ("email",),
    "importlib": ("importlib",),
    "multiprocessing": ("multiprocessing",),
    "unittest": ("unittest",),
    "web": ("http", "urllib", "html", "wsgiref", "xmlrpc"),
    "xml": ("xml",),
}
HELD_OUT = 0.3  # share of the files that training never sees


def standard_library(seed: int):
    """(train, held-out) data sets of whole source files with columns text, label and file, split by file."""
    from datasets import ClassLabel, Dataset, Features, Value

    rows = ([], [])
    for label, packages in enumerate(FAMILIES.values()):
        files = [f for f in python_sources(*packages) if f.stat().st_size > 1000]
        if len(files) < 2:
            raise UserError(
                f"this Python comes without the sources of {', '.join(packages)}; give a data set with --dataset"
            )
        for side, part in zip(rows, split_files(files, HELD_OUT, seed), strict=True):
            side += [{"text": f.read_text("utf-8", errors="replace"), "label": label, "file": str(f)} for f in part]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(FAMILIES)), "file": Value("string")})
    return tuple(Dataset.from_list(side, features=features) for side in rows)


def load_any(name: str, text_column: str | None, label_column: str | None, seed: int):
    """(train, held-out) of a hub data set, a folder of save_to_disk, or csv, json, parquet or text files."""
    splits = _load(name)
    if "train" not in splits:
        raise UserError(f"--dataset {name!r} has no split 'train', only {', '.join(splits)}")
    train = splits["train"]
    if len(train) == 0:
        raise UserError(f"--dataset {name!r}: its split 'train' is empty")
    text = _column(name, train, text_column, ("text", "content", "document", "sentence"), "--text-column")
    label = _column(name, train, label_column, ("label", "labels", "class", "category"), "--label-column")
    held_out = next(
        (splits[s] for s in ("test", "validation") if s in splits and label in splits[s].column_names), None
    )
    if held_out is None:
        if len(train) < 2:
            raise UserError(f"--dataset {name!r} has one document; it takes two at least, one of them held out")
        parts = train.train_test_split(test_size=HELD_OUT, seed=seed)
        train, held_out = parts["train"], parts["test"]
    return _labelled(name, train, held_out, text, label)


def _load(name: str):
    import datasets

    path = Path(name)
    kinds = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            loaded = datasets.load_from_disk(name)
        elif path.is_file():
            if path.suffix not in kinds:
                raise UserError(f"--dataset {name!r}: a file must end in {', '.join(kinds)}")
            loaded = datasets.load_dataset(kinds[path.suffix], data_files=name)
        else:
            loaded = datasets.load_dataset(name)
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds here, network errors among them
        raise UserError(
            f"--dataset {name!r} is no data set here or on a hub that this machine reaches ({first_line(error)}). "
            "Check the name at https://huggingface.co/datasets, or give a folder or a csv, json or parquet file"
        ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _column(name: str, rows, asked: str | None, usual: tuple[str, ...], option: str) -> str:
    if asked is not None and asked not in rows.column_names:
        raise UserError(f"--dataset {name!r} has no column {asked!r}; {option} may be {', '.join(rows.column_names)}")
    found = asked or next((c for c in usual if c in rows.column_names), None)
    if found is None:
        raise UserError(f"--dataset {name!r}: say with {option} which column to use: {', '.join(rows.column_names)}")
    return found


def _labelled(name: str, train, held_out, text: str, label: str):
    """Columns text and label alone, label a ClassLabel over the values that training has."""
    from datasets import ClassLabel

    sides = []
    names = getattr(train.features[label], "names", None) or sorted({str(v) for v in train[label] if v is not None})
    if len(names) < 2:
        raise UserError(
            f"--dataset {name!r}: column {label!r} holds {len(names)} class(es); a classifier needs 2 at least"
        )
    for side in (train, held_out):
        side = side.select_columns([text, label]).rename_columns(
            {c: n for c, n in ((text, "text"), (label, "label")) if c != n}
        )
        side = side.filter(lambda row: row["text"] and row["label"] is not None)
        if not isinstance(side.features["label"], ClassLabel):
            side = side.map(lambda row: {"label": str(row["label"])}).filter(lambda row: row["label"] in names)
            side = side.cast_column("label", ClassLabel(names=names))
        if len(side) == 0:
            raise UserError(f"--dataset {name!r}: no row is left that has both text and label")
        sides.append(side)
    return tuple(sides)


def cut_windows(documents, tokenizer, max_length: int, per_class: int, seed: int):
    """Documents cut into windows of up to `max_length` tokens, at most `per_class` of each class.

    The windows of a class are taken round robin over its documents, first windows first, so that no long document
    outweighs the others; those dropped are the later windows of long documents. Tails under an eighth of the length are
    dropped unless they are all that a document has. The order is shuffled by `seed`.
    """
    from datasets import Dataset

    by_class = defaultdict(list)
    for number, row in enumerate(documents):
        pieces = tokenizer(row["text"], truncation=True, max_length=max_length, return_overflowing_tokens=True)[
            "input_ids"
        ]
        for turn, ids in enumerate(pieces):
            if turn == 0 or len(ids) * 8 >= max_length:
                by_class[row["label"]].append((turn, number, ids))
    rows = []
    for label, windows in by_class.items():
        windows.sort(key=lambda w: w[:2])
        rows += [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "label": label} for _, _, ids in windows[:per_class]
        ]
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows)


def describe(windows, names: list[str]) -> str:
    """One line: how many windows and tokens, and how many windows of each class."""
    lengths = sorted(len(ids) for ids in windows["input_ids"])
    counts = Counter(windows["label"])
    classes = ", ".join(f"{names[label]} {counts[label]}" for label in sorted(counts))
    return (
        f"{len(lengths)} windows, {sum(lengths):,} tokens, {lengths[0]} to {lengths[-1]} tokens each, "
        f"median {lengths[len(lengths) // 2]} ({classes})"
    )
