"""Padding masks, key ranges and packed sequences: one picture of who sees whom, made once per forward pass.

:class:`Visibility` is what the mask function of ``masks.py`` hands to a model instead of a quadratic mask; every
layer turns it into arguments of :func:`hf_flash.flash_attention`. ``Visibility.dense`` says the same as a bool matrix,
for the calls that fall back and for the tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = [
    "Packing", "Visibility", "is_traced", "key_ranges", "packed_bias", "packing_from_cu_seqlens", "packing_from_ids",
    "sequence_ids", "tokens_of_heads",
]  # fmt: skip


def is_traced() -> bool:
    """Whether a call is being recorded, by torch.compile, torch.export or torch.jit.trace, and will run on other data:
    what is read back from a tensor would hold for the data of today alone."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class Packing:
    """Sequences that lie one after another in ``(B * S)`` tokens.

    cu_seqlens_q, cu_seqlens_k: int32 ``(N + 1,)``, where each sequence starts, and the end; max_seqlen_q,
    max_seqlen_k: length of the longest.
    """

    __slots__ = ("cu_seqlens_k", "cu_seqlens_q", "max_seqlen_k", "max_seqlen_q")

    def __init__(self, cu_seqlens_q, cu_seqlens_k, max_seqlen_q: int, max_seqlen_k: int):
        self.cu_seqlens_q, self.cu_seqlens_k = cu_seqlens_q, cu_seqlens_k
        self.max_seqlen_q, self.max_seqlen_k = max_seqlen_q, max_seqlen_k

    def arguments(self) -> dict:
        return {name: getattr(self, name) for name in self.__slots__}

    def to(self, device) -> Packing:
        return Packing(self.cu_seqlens_q.to(device), self.cu_seqlens_k.to(device), self.max_seqlen_q, self.max_seqlen_k)

    def dense(self, batch: int, q_length: int, k_length: int) -> torch.Tensor:
        """bool (B, 1, Sq, Sk), True where query and key belong to one sequence."""
        same = _number(self.cu_seqlens_q, batch * q_length)[:, None] == _number(self.cu_seqlens_k, batch * k_length)
        same = same.view(batch, q_length, batch, k_length)
        index = torch.arange(batch, device=same.device)
        return same[index, :, index][:, None]

    def distance(self, batch: int, q_length: int, k_length: int) -> torch.Tensor:
        """int (B, 1, Sq, Sk): j - position(i) within a sequence, whose last query stands at its last key."""
        queries = _to_end(self.cu_seqlens_q, batch * q_length).view(batch, 1, q_length, 1)
        return queries - _to_end(self.cu_seqlens_k, batch * k_length).view(batch, 1, 1, k_length)


def _number(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """The number of each token's sequence, (total,); -1 before the first, N after the last."""
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, tokens, right=True) - 1


def _to_end(cu_seqlens, total: int) -> torch.Tensor:
    """How far each token stands from its sequence's end, (total,); without meaning for tokens of no sequence."""
    ends = cu_seqlens[(_number(cu_seqlens, total) + 1).clamp(max=len(cu_seqlens) - 1)]
    return ends - torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)


def packing_from_cu_seqlens(cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None) -> Packing:
    """From Transformers' keywords; any integer dtype. A missing length is read from the device, which synchronises."""

    def longest(given, cu_seqlens):
        if given is not None:
            return int(given)
        return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0

    same = cu_seqlens_q is cu_seqlens_k
    max_seqlen_q = longest(max_seqlen_q, cu_seqlens_q)
    max_seqlen_k = max_seqlen_q if same and max_seqlen_k is None else longest(max_seqlen_k, cu_seqlens_k)
    cu_seqlens_q = cu_seqlens_q.to(torch.int32)
    return Packing(cu_seqlens_q, cu_seqlens_q if same else cu_seqlens_k.to(torch.int32), max_seqlen_q, max_seqlen_k)


def packing_from_ids(ids: torch.Tensor) -> Packing:
    """From each token's sequence number, ``(B, S)``: a new sequence starts where it changes, and in every batch row.

    Reads how many there are and the longest from the device: two synchronisations.
    """
    batch, length = ids.shape
    starts = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True).reshape(-1).nonzero().flatten()
    cu_seqlens = F.pad(starts, (0, 1), value=batch * length).to(torch.int32)
    longest = int(cu_seqlens.diff().max()) if batch * length else 0
    return Packing(cu_seqlens, cu_seqlens, longest, longest)


def sequence_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """Each token's sequence number ``(B, S)`` from positions that restart; all zeros where they are no packing.

    Positions are a packing when they count up by one and now and then fall back to the first one (0; RoBERTa counts
    from ``padding_idx + 1``). Anything else (constant, shuffled, left-padded positions) is left alone.
    """
    first = position_ids[:, :1]
    counts_up = position_ids[:, 1:] == position_ids[:, :-1] + 1
    breaks = F.pad(~counts_up, (1, 0), value=False)
    is_packing = (~breaks | (position_ids == first)).all(dim=1, keepdim=True) & counts_up.any(dim=1, keepdim=True)
    return (breaks & is_packing).cumsum(1)


def packed_bias(bias: torch.Tensor, relative: bool, call: dict) -> torch.Tensor:
    """A bias over all tokens of a packed batch, counted from each sequence's start as the kernel does.

    relative: whether it depends on distances alone. call: flash_attention's keywords, packed or not.
    """
    if "cu_seqlens_q" not in call or bias.shape[-2:] == (1, 1):
        return bias
    if not relative:
        raise ValueError(
            f"hf_flash [PACKED]: packed sequences with a bias of shape {tuple(bias.shape)}, which may differ from "
            "sequence to sequence; pass padded batches instead"
        )
    for name, size in zip(("max_seqlen_q", "max_seqlen_k"), bias.shape[-2:], strict=True):
        if size > 1:  # more than there are tokens are allowed
            call[name] = min(call[name], size)
    return bias[..., : call["max_seqlen_q"], : call["max_seqlen_k"]]


def tokens_of_heads(t: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) -> (B * S, H, D)."""
    return t.transpose(1, 2).flatten(0, 1)


def key_ranges(padding: torch.Tensor, waits: bool = False) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A padding mask ``(B, Sk)`` bool as ``key_range`` int32 (B, 2), with a mask (B, 1, 1, Sk) where it has holes.

    On the CPU, or if the host ``waits`` for the device, the answer is (None, None) when every key is visible. Otherwise
    nothing is read back, for which a training step would wait: it is always range and mask together, and kernels look
    for holes. So it is where a call is traced. The mask may be a view of ``padding``.
    """
    length = padding.shape[1]
    if length == 0:
        return None, None
    ints = padding.to(torch.int32)
    begin = ints.argmax(1)
    count = ints.sum(1)
    end = torch.where(count > 0, length - ints.flip(1).argmax(1), begin)
    ranges = torch.stack([begin, end], 1).to(torch.int32)
    readable = type(padding) is torch.Tensor  # a subclass may have no values: FakeTensor
    if is_traced() or not readable or not (waits or padding.device.type == "cpu"):
        return ranges, padding[:, None, None, :]
    all_visible, no_holes = torch.stack([count.eq(length).all(), count.eq(end - begin).all()]).tolist()
    if all_visible:
        return None, None
    return ranges, None if no_holes else padding[:, None, None, :]


class Visibility:
    """Who sees whom in one forward pass; handed from layer to layer in place of a mask.

    Query i of a batch entry stands at key position ``i + query_offset`` and sees the keys j with ``-left <= j -
    position <= right`` (``window = (left, right)``, -1 unlimited) that lie in ``key_range``, are True in ``mask`` and
    belong to its sequence (``ids``, or ``packing``).

    batch, q_length, k_length: what it was made for. query_offset: int, or an int tensor of one element on the device.
    key_range: int32 (B, 2). mask: bool, broadcasts to (B, 1, Sq, Sk). ids: int (B, S), each token's sequence number.
    unpadded: no padding mask was given, so restarting positions mean packed sequences. own_mask: nor is ``mask`` the
    user's; Transformers made it.
    """

    ndim = 4  # Transformers asks a mask for these: a mask of four dimensions is passed on as it is

    def __init__(
        self, batch, q_length, k_length, *, window=(-1, -1), query_offset=0, key_range=None, mask=None, ids=None,
        packing=None, unpadded=False, own_mask=False,
    ):  # fmt: skip
        self.batch, self.q_length, self.k_length = batch, q_length, k_length
        self.window, self.query_offset = window, query_offset
        self.key_range, self.mask, self.ids = key_range, mask, ids
        self.unpadded, self.own_mask = unpadded, own_mask
        self._packing = packing
        self._offsets = {}
        self._positions = None
        self._hides_keys = []  # the answer, once it is known

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, 1, self.q_length, self.k_length)

    @property
    def device(self) -> torch.device | None:
        packed = None if self._packing is None else self._packing.cu_seqlens_q
        tensors = (self.key_range, self.mask, self.ids, self.query_offset, packed)
        return next((t.device for t in tensors if isinstance(t, torch.Tensor)), None)

    def __radd__(self, scores):
        raise TypeError(
            "hf_flash [MODEL]: an attention module adds its mask to its scores itself, so it does not go through "
            "Transformers' attention interface and cannot use attn_implementation='hf_flash'; keep 'sdpa' or 'eager'"
        )

    def contiguous(self) -> Visibility:
        return self

    def to(self, device, *args, **kwargs) -> Visibility:
        """The same on another device (accelerate moves every layer's arguments)."""
        if not isinstance(device, (torch.device, str, int)) or self.device in (None, torch.device(device)):
            return self

        def move(x):
            return x.to(device) if isinstance(x, (torch.Tensor, Packing)) else x

        return Visibility(
            self.batch, self.q_length, self.k_length, window=self.window, query_offset=move(self.query_offset),
            key_range=move(self.key_range), mask=move(self.mask), ids=move(self.ids), packing=move(self._packing),
            unpadded=self.unpadded, own_mask=self.own_mask,
        )  # fmt: skip

    def packing(self) -> Packing | None:
        """Packed sequences as cu_seqlens, computed at most once."""
        if self._packing is None and self.ids is not None:
            self._packing = packing_from_ids(self.ids)
        return self._packing

    def packed_by(self, position_ids: torch.Tensor) -> Visibility:
        """Self where ``position_ids`` (B, S) do not restart, otherwise self with their packing; computed once."""
        if is_traced():
            return self._with_ids(sequence_ids(position_ids))
        if self._positions is None or self._positions[0] is not position_ids:
            ids = sequence_ids(position_ids)
            self._positions = (position_ids, self._with_ids(ids) if bool(ids[:, -1:].any()) else self)
        return self._positions[1]

    def with_packing(self, key: torch.Tensor, make) -> Visibility:
        """Self with the packing that ``make()`` returns; made once for all layers that pass the same ``key`` tensor."""
        if torch.compiler.is_compiling() or self._positions is None or self._positions[0] is not key:
            packed = Visibility(self.batch, self.q_length, self.k_length, window=self.window, packing=make())
            if torch.compiler.is_compiling():
                return packed
            self._positions = (key, packed)
        return self._positions[1]

    def with_dense_packing(self, cu_seqlens_q, cu_seqlens_k, ids) -> Visibility:
        """Self's mask without what lies in another packed sequence, where cu_seqlens' values cannot be looked at."""
        if cu_seqlens_q is not None:
            same = Packing(cu_seqlens_q, cu_seqlens_k, 0, 0).dense(1, self.q_length, self.k_length)
        else:
            same = ids.reshape(1, 1, -1, 1) == ids.reshape(1, 1, 1, -1)
        return Visibility(1, self.q_length, self.k_length, mask=self.mask & same)

    def _with_ids(self, ids) -> Visibility:
        return Visibility(self.batch, self.q_length, self.k_length, window=self.window, ids=ids)

    def bidirectional(self) -> Visibility:
        """Self without the causal limit."""
        visible = Visibility(
            self.batch, self.q_length, self.k_length, window=(self.window[0], -1), query_offset=self.query_offset,
            key_range=self.key_range, mask=self.mask, ids=self.ids, packing=self._packing, unpadded=self.unpadded,
        )  # fmt: skip
        visible._hides_keys = self._hides_keys
        return visible

    def arguments(self, batch: int, q_length: int, k_length: int, device) -> dict:
        """Keywords for flash_attention on q ``(B, Sq, H, D)`` and k ``(B, Sk, H, D)``; ``cu_seqlens`` among them when
        q and k have to be flattened to ``(B * S, H, D)``."""
        self._check(batch, q_length, k_length)
        if self.ids is not None and is_traced():  # cu_seqlens' length would depend on the data
            return self._dense_arguments(batch, q_length, k_length)
        packing = self.packing()
        if packing is not None:
            return {"window": self.window, **packing.arguments()}
        arguments = {}
        if self.window != (-1, -1):
            arguments["window"] = self.window
            offset = self._offset(batch, k_length - q_length, device)
            if offset is not None:
                arguments["query_offset"] = offset
        key_range = self.key_range
        if key_range is None and k_length > self._last_key(k_length):
            key_range = torch.tensor([[0, self.k_length]], dtype=torch.int32, device=device)
        if key_range is not None:
            arguments["key_range"] = key_range if key_range.shape[0] == batch else key_range.expand(batch, 2)
        if self.mask is not None:
            arguments["mask"] = _columns(self.mask, k_length)
        return arguments

    def _dense_arguments(self, batch, q_length, k_length) -> dict:
        return {"mask": self.dense(batch, q_length, k_length, self.ids.device)}

    def _last_key(self, k_length: int) -> int:
        """Keys from here on are not seen. Where nothing restricts a call, all are: encoders make this without knowing
        of the cache whose keys a prefix tuning puts in front, and their own attention has no mask then."""
        restricted = self.ids is not None or self._packing is not None or self.mask is not None
        free = self.unpadded and self.window == (-1, -1) and self.key_range is None and not restricted
        return k_length if free else self.k_length

    def _check(self, batch, q_length, k_length) -> None:
        # Transformers takes the number of keys from attention_mask. A causal one, or a mask with rows of its own, has
        # fewer than a static cache has places.
        padded = self.window == (-1, -1) and self.key_range is not None
        if padded and k_length != self.k_length and not is_traced():
            raise ValueError(
                f"hf_flash [MASK]: attention_mask has {self.k_length} columns, but there are {k_length} keys; give it "
                "a column for each token that is attended to"
            )
        rows_matter = self.mask is not None and self.mask.shape[2] > 1
        if (rows_matter and q_length != self.q_length) or (self.batch not in (1, batch)):
            raise ValueError(
                f"hf_flash: a mask made for {self.batch} sequences of {self.q_length} queries met q of {batch} "
                f"sequences of {q_length} queries; make the mask and the hidden states from the same batch"
            )

    def _offset(self, batch, default, device) -> torch.Tensor | None:
        """query_offset as int32 (B,), None when it is flash_attention's own default."""
        offset = self.query_offset
        if isinstance(offset, torch.Tensor):
            return offset.to(device=device, dtype=torch.int32).reshape(-1).expand(batch)
        if offset == default:
            return None
        if torch.compiler.is_compiling():
            return torch.full((batch,), offset, dtype=torch.int32, device=device)
        key = (batch, offset, device)
        if key not in self._offsets:
            self._offsets[key] = torch.full((batch,), offset, dtype=torch.int32, device=device)
        return self._offsets[key]

    def hides_keys(self) -> bool:
        """Whether ``key_range`` or ``mask`` hides a key. May read a padding mask back from its device, once."""
        if self.mask is None or self.mask.shape[1:3] != (1, 1) or is_traced():
            return self.key_range is not None or self.mask is not None
        if not self._hides_keys:
            shown = self.mask.all()
            if self.key_range is not None:
                shown = shown & (self.key_range[:, 0] <= 0).all() & (self.key_range[:, 1] >= self.k_length).all()
            self._hides_keys.append(not bool(shown))
        return self._hides_keys[0]

    def is_plain(self, q_length: int, k_length: int) -> str | None:
        """ "full" or "causal" where scaled_dot_product_attention needs no mask, otherwise None."""
        if self.ids is not None or self._packing is not None or self._last_key(k_length) < k_length:
            return None
        if self.hides_keys():
            return None
        if self.window == (-1, -1):
            return "full"
        square = isinstance(self.query_offset, int) and self.query_offset == 0 and q_length == k_length
        return "causal" if square and self.window == (-1, 0) else None

    def dense(self, batch: int, q_length: int, k_length: int, device) -> torch.Tensor:
        """The same as a bool matrix that broadcasts to (B, 1, Sq, Sk), True = visible."""
        i = torch.arange(q_length, device=device).view(1, 1, -1, 1)
        j = torch.arange(k_length, device=device).view(1, 1, 1, -1)
        if self.ids is None and self._packing is not None:
            distance = self._packing.to(device).distance(batch, q_length, k_length)
        else:
            offset = 0 if self.ids is not None else self.query_offset
            distance = j - i - (offset.to(device).reshape(-1, 1, 1, 1) if isinstance(offset, torch.Tensor) else offset)
        left, right = self.window
        visible = (j < self._last_key(k_length)).expand(1, 1, q_length, k_length)
        if left >= 0:
            visible = visible & (distance >= -left)
        if right >= 0:
            visible = visible & (distance <= right)
        if self.key_range is not None:
            begin, end = self.key_range.to(device).view(-1, 2, 1, 1, 1).unbind(1)
            visible = visible & (j >= begin) & (j < end)
        if self.mask is not None:
            visible = visible & _columns(self.mask.to(device), k_length)
        if self.ids is not None:
            visible = visible & (self.ids[:, None, :, None] == self.ids[:, None, None, :]).to(device)
        elif self._packing is not None:
            visible = visible & self._packing.to(device).dense(batch, q_length, k_length)
        return visible


def _columns(mask: torch.Tensor, k_length: int) -> torch.Tensor:
    """A mask cut or filled up with False to ``k_length`` keys (a static cache has more keys than the mask columns)."""
    missing = k_length - mask.shape[-1]
    if missing == 0 or mask.shape[-1] == 1:
        return mask
    return F.pad(mask, (0, missing), value=False) if missing > 0 else mask[..., :k_length]
