"""Longer position tables for models that learnt one: BERT's 512 rows become 2048."""

from __future__ import annotations

import torch
from common import UserError
from torch import nn

TABLE_NAMES = ("position_embeddings", "wpe")  # BERT and its relatives; GPT-2


def position_table(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """The name and module of the model's learnt position table, or None (rotary or relative positions)."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in TABLE_NAMES and type(module) is nn.Embedding:
            return name, module
    return None


def reserved_rows(table: nn.Embedding) -> int:
    """Rows at the table's start that no token uses: RoBERTa counts its positions from padding_idx + 1."""
    return 0 if table.padding_idx is None else table.padding_idx + 1


def longest_input(model: nn.Module) -> int | None:
    """Tokens that the model can take at once, or None where its positions set no limit."""
    table = position_table(model)
    if table is not None:
        return table[1].num_embeddings - reserved_rows(table[1])
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def tile_rows(weight: torch.Tensor, rows: int, reserved: int = 0) -> torch.Tensor:
    """A table (rows, hidden) that starts with `weight` (n, hidden) and then repeats its learnt rows.

    Repeating keeps what attention heads learnt about near neighbours (row i against row i + 1), which interpolation
    would squeeze; Longformer (Beltagy et al. 2020, section 5) starts from copies too. The first position is left out of
    the repeats: it belongs to [CLS], and no other token ever stood there. At the seams the neighbours are wrong;
    training mends them.
    """
    repeated = weight[reserved + 1 :]
    missing = rows - weight.shape[0]
    copies = -(-missing // repeated.shape[0])
    return torch.cat([weight, repeated.repeat(copies, 1)[:missing]])


def stretch_positions(model: nn.Module, positions: int) -> nn.Module:
    """The model with room for `positions` tokens; the model itself where it has that room already.

    It is built anew from its config, so that every buffer whose size follows from the table is right, and then takes
    over all weights. Inputs up to the old length give the logits they gave before.
    """
    limit = longest_input(model)
    if limit is None or limit >= positions:
        return model
    found = position_table(model)
    if found is None:
        raise UserError(
            f"{type(model).__name__} takes up to {limit} tokens and has no learnt position table that could be "
            f"stretched to {positions}; give --positions {limit} and a --max-length up to that, or another --model"
        )
    name, table = found
    rows = positions + reserved_rows(table)
    state = model.state_dict()
    state[f"{name}.weight"] = tile_rows(table.weight.detach(), rows, reserved_rows(table))
    model.config.max_position_embeddings = rows
    longer = type(model)(model.config)
    longer.load_state_dict(state)
    return longer.to(table.weight.dtype).train(model.training)
