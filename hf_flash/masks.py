"""Transformers' mask functions as :class:`Visibility`: who sees whom, without a quadratic mask.

Beside ``backend.py`` this is the only file that touches Transformers' private names.
"""

from __future__ import annotations

import torch
import transformers.masking_utils as masking

from .packing import Visibility, is_traced, key_ranges


def _closure(function) -> dict:
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _narrower(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


def recognise(function) -> tuple[tuple[int, int], torch.Tensor | None] | None:
    """A mask function as ((window_left, window_right), sequence numbers), None when it is something else.

    Windows and packing arrive as closures, told apart by the function of masking_utils that made them.
    """
    if function is masking.causal_mask_function:
        return (-1, 0), None
    if function is masking.bidirectional_mask_function:
        return (-1, -1), None
    if torch.compiler.is_compiling() or getattr(function, "__module__", None) != masking.__name__:
        return None
    maker, cells = function.__qualname__.partition(".")[0], _closure(function)
    if maker == "sliding_window_overlay" and cells["sliding_window"] > 0:
        return (cells["sliding_window"] - 1, -1), None
    if maker == "sliding_window_bidirectional_overlay" and cells["sliding_window"] >= 0:
        return (cells["sliding_window"], cells["sliding_window"]), None
    if maker == "packed_sequence_mask_function":
        return (-1, -1), cells["packed_sequence_mask"]
    if maker == "remap_positions_for_packed_sequence":  # windows count differences, which packed positions keep
        return recognise(cells["mask_function"])
    if maker != "and_masks":
        return None
    window, ids = (-1, -1), None
    for part in cells["mask_functions"]:
        found = recognise(part)
        if found is None or (ids is not None and found[1] is not None):
            return None
        window = (_narrower(window[0], found[0][0]), _narrower(window[1], found[0][1]))
        ids = found[1] if ids is None else ids
    return window, ids


def _check_padding(attention_mask: torch.Tensor, batch_size: int) -> None:
    shape = tuple(attention_mask.shape)
    if len(shape) != 2:
        raise ValueError(
            f"hf_flash [MASK]: attention_mask has shape {shape}; it must be (batch, keys), or of four dimensions"
        )
    if not is_traced() and shape[0] not in (1, batch_size):
        raise ValueError(
            f"hf_flash [MASK]: attention_mask has shape {shape}, but there are {batch_size} sequences; give it a row "
            "for each"
        )


def make_mask(
    batch_size, q_length=None, kv_length=None, q_offset=0, kv_offset=0, mask_function=masking.causal_mask_function,
    attention_mask=None, cache_position=None, **kwargs,
) -> Visibility:  # fmt: skip
    """Transformers' mask function: called once per forward pass, its answer goes to every layer.

    Never None, so a model that does not hand its mask to our attention function fails loudly.
    """
    if isinstance(attention_mask, Visibility):  # made in advance by generate() for a static cache
        return attention_mask
    counts_up = True
    if cache_position is not None:  # transformers 5.0
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        kwargs["cache_position"] = cache_position
        if not is_traced() and q_length > 1:
            counts_up = bool((cache_position.diff() == 1).all())
    else:
        kwargs |= {"q_length": q_length, "q_offset": q_offset}
    found = recognise(mask_function) if counts_up else None
    if found is None:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        dense = masking.sdpa_mask(
            batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, **kwargs,
        )  # fmt: skip
        return Visibility(batch_size, q_length, kv_length, mask=dense, own_mask=attention_mask is None)
    window, ids = found
    offset = q_offset - kv_offset
    if isinstance(offset, torch.Tensor) and offset.device.type == "cpu" and not is_traced():
        offset = int(offset)
    key_range = mask = None
    if attention_mask is not None:
        _check_padding(attention_mask, batch_size)
        padding = masking.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = padding[0] if isinstance(padding, tuple) else padding
        key_range, mask = key_ranges(padding[:, kv_offset : kv_offset + kv_length].to(torch.bool, copy=True))
    return Visibility(
        batch_size, q_length, kv_length, window=window, query_offset=offset, key_range=key_range, mask=mask, ids=ids,
        unpadded=attention_mask is None and ids is None,
    )  # fmt: skip
