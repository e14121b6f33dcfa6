"""The contract of the attention operator in plain PyTorch: the specification that runs.

Autograd differentiates it, so its gradients are the contract's gradients. It is quadratic in memory and meant for tests
and for reading, not for speed. Imports torch alone.
"""

import math

import torch

LOW_WORD = 0xFFFFFFFF


def dropout_keep(dropout_p):
    """How many of 256 byte values keep a probability: dropout works in steps of 1/256."""
    return min(256, max(1, math.floor(256 * (1 - dropout_p) + 0.5)))


def dropout_mask(seed, batch, heads, seqlen_q, seqlen_k, keep):
    """True where a probability is kept: bool (batch, heads, seqlen_q, seqlen_k), a function of seed and place alone.

    ``seed`` is an int64 tensor of one element, and the mask lies on its device; ``keep`` of 256 byte values keep.
    One call of Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives 16 bytes, one
    for each element of a 16 x 16 block that one lane of a tensor-core fragment holds. With i and j taken apart as
    i = 16 block_i + 8 high_i + 2 a + odd_i, the block, a and b choose the call, odd the word, high the byte in it.
    """
    seed = seed.reshape(())
    index = torch.arange(max(batch * heads, -(-seqlen_q // 16), -(-seqlen_k // 16), 4), device=seed.device)
    plane, block_i, a = index[: batch * heads], index[: -(-seqlen_q // 16)], index[:4]
    plane, block_i, a = plane.view(-1, 1, 1, 1, 1), block_i.view(-1, 1, 1, 1), a.view(-1, 1, 1)
    block_j, b = index[: -(-seqlen_k // 16)].view(-1, 1), index[:4]

    c0, c1, c2, c3 = 4 * a + b, block_i, block_j, plane
    key0, key1 = seed & LOW_WORD, (seed >> 32) & LOW_WORD
    for _ in range(7):
        x, y = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64-bit products may wrap to negative: both halves stay exact
        c0, c1, c2, c3 = (y >> 32 & LOW_WORD) ^ c1 ^ key0, y & LOW_WORD, (x >> 32 & LOW_WORD) ^ c3 ^ key1, x & LOW_WORD
        key0, key1 = (key0 + 0x9E3779B9) & LOW_WORD, (key1 + 0xBB67AE85) & LOW_WORD

    words = torch.stack([c0, c1, c2, c3], dim=-1).unflatten(-1, (2, 2))  # (plane, block_i, a, block_j, b, odd_i, odd_j)
    draws = words[..., None, None] >> (16 * index[:2, None] + 8 * index[:2]) & 0xFF  # (..., high_i, high_j)
    draws = draws.permute(0, 1, 7, 2, 5, 3, 8, 4, 6).reshape(batch, heads, 16 * len(block_i), 16 * len(block_j))
    return (draws < keep)[:, :, :seqlen_q, :seqlen_k]


def reference_attention(
    q,
    k,
    v,
    *,
    scale=None,
    causal=False,
    window=(-1, -1),
    softcap=0.0,
    bias=None,
    mask=None,
    alibi_slopes=None,
    sink=None,
    dropout_p=0.0,
    dropout_seed=None,
    key_range=None,
    query_range=None,
    query_offset=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dtype=torch.float64,
):
    """Attention as ``hf_flash.flash_attention`` defines it; the arguments have the meaning and the shapes given there.

    Returns out, (B, Sq, Hq, Dv) or packed (T, Hq, Dv), in ``dtype``, and lse, the natural logarithm of each row's sum
    of exponentials, (B, Hq, Sq) or packed (Hq, T). With a narrower ``dtype`` the two matrix products work in it and the
    softmax in float32, as models attend without a fused kernel: the error that a kernel's error is measured by.
    """
    packed, total_q = cu_seqlens_q is not None, q.shape[0]
    if packed:  # the right-padded batch of the sequences, its padding left out again at the end
        rows_q, len_q = _rows_of_sequences(cu_seqlens_q, max_seqlen_q, q.shape[0])
        rows_k, len_k = _rows_of_sequences(cu_seqlens_k, max_seqlen_k, k.shape[0])
        q, k, v = _with_padding(q, rows_q), _with_padding(k, rows_k), _with_padding(v, rows_k)
        query_range, key_range = (torch.stack([0 * length, length], dim=1) for length in (len_q, len_k))
        query_offset = len_k - len_q if query_offset is None else query_offset

    # Where things are. Shapes below are (B, Hq, Sq, Sk), with 1 where a dimension does not matter.
    batch, seqlen_q, heads = q.shape[:3]
    seqlen_k, group = k.shape[1], heads // k.shape[2]
    i = torch.arange(seqlen_q, device=q.device).view(1, 1, -1, 1)
    j = torch.arange(seqlen_k, device=q.device).view(1, 1, 1, -1)
    in_query_range = _inside(query_range, i)
    in_key_range = _inside(key_range, j)
    distance = j - i - (seqlen_k - seqlen_q if query_offset is None else query_offset.view(-1, 1, 1, 1))
    left, right = window[0], 0 if causal else window[1]
    visible = in_query_range & in_key_range
    visible = visible if left < 0 else visible & (distance >= -left)
    visible = visible if right < 0 else visible & (distance <= right)
    visible = visible if mask is None else visible & mask
    wide = torch.promote_types(dtype, torch.float32)

    # Scores. Rows outside the ranges may hold anything: they become zero before they are used.
    q = q.transpose(1, 2).to(dtype).masked_fill(~in_query_range, 0)
    k, v = (x.transpose(1, 2).to(dtype).masked_fill(~in_key_range.mT, 0) for x in (k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = (q @ k.mT).to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(wide).view(-1, heads, 1, 1) * distance.abs()
    if bias is not None:
        s = s + bias.to(wide)
    s = torch.where(visible, s, -math.inf)

    # Softmax, a row that sees nothing giving zeros, then dropout, then the values.
    sink = torch.full((heads,), -math.inf, dtype=wide, device=q.device) if sink is None else sink.to(wide)
    sink = torch.where(in_query_range, sink.view(1, -1, 1, 1), -math.inf)
    s = torch.cat([s, sink.expand(batch, heads, seqlen_q, 1)], dim=-1)
    top = s.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(wide).min)
    p = torch.exp(s - top)
    total = p.sum(dim=-1, keepdim=True)
    seen = total > 0
    total = torch.where(seen, total, 1)
    lse = torch.where(seen, torch.log(total) + top, -math.inf).squeeze(-1)
    p = p[..., :-1] / total
    keep = dropout_keep(dropout_p)
    if keep < 256:
        p = p * (256 / keep) * dropout_mask(dropout_seed, batch, heads, seqlen_q, seqlen_k, keep)
    out = (p.to(dtype) @ v).masked_fill(~in_query_range, 0).transpose(1, 2)
    if packed:
        out = _without_padding(out, rows_q, total_q, 0)
        lse = _without_padding(lse.mT, rows_q, total_q, -math.inf).mT
    return out, lse


def _inside(limits, index):
    """bool, 1 or B in the first dimension: whether index lies in [begin, end) of limits, int32 (B, 2) or None."""
    if limits is None:
        return torch.ones_like(index, dtype=torch.bool)
    begin, end = limits.view(-1, 2, 1, 1, 1).unbind(1)
    return (index >= begin) & (index < end)


def _rows_of_sequences(cu_seqlens, max_seqlen, total):
    """Where the right-padded batch finds its rows among a packed batch's ``total`` rows, (B, S), and lengths (B).

    Padding points at the row after the last. Wrong values are clamped, as the kernels clamp them.
    """
    begin = cu_seqlens[:-1].long().clamp(0, total)
    length = torch.maximum(cu_seqlens[1:].long(), begin).clamp(max=total) - begin
    width = int(length.max()) if max_seqlen is None else max_seqlen
    length = length.clamp(max=width)
    index = torch.arange(width, device=cu_seqlens.device)
    return torch.where(index < length[:, None], begin[:, None] + index, total), length


def _with_padding(packed, rows):
    return torch.cat([packed, packed.new_zeros(1, *packed.shape[1:])])[rows]


def _without_padding(padded, rows, total, fill):
    return padded.new_full((total + 1, *padded.shape[2:]), fill).index_put((rows,), padded)[:total]
