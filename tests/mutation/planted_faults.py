"""Small faults, each of which must turn a named fast test red.

A fault is a change in a copy of the sources: in ``file``, ``original`` (which must stand there exactly once) becomes
``faulty``, where FAULT is true while that fault is switched on. So all faults are compiled once, side by side.
"""

from typing import NamedTuple

RULE = "tests/ops/test_rule.py::test_feature[cpu-float32-{}]"
PACKED = "tests/ops/test_rule.py::test_packed[cpu-float32-{}]"
DROPOUT = "tests/ops/test_dropout.py::{}"


class Fault(NamedTuple):
    name: str
    file: str
    original: str
    faulty: str
    test: str


FORWARD, BACKWARD, SCORE = "csrc/cpu/forward.h", "csrc/cpu/backward.h", "csrc/cpu/score.h"
ROW_SUM, SEQUENCE = "csrc/cpu/row_sum.h", "csrc/attention/sequence.h"
OPS, ATTENTION, BINDINGS = "hf_flash/ops.py", "hf_flash/attention.py", "csrc/bindings.cpp"

FAULTS = [
    Fault("the scale is dropped", FORWARD,
          "tile.rows, p.head_dim, static_cast<T>(p.scale));",
          "tile.rows, p.head_dim, FAULT ? T(1) : static_cast<T>(p.scale));", RULE.format("plain")),
    Fault("the scale is missing in the gradient", BACKWARD,
          "scale_gradient(s, static_cast<T>(p.scale)",
          "scale_gradient(s, FAULT ? T(1) : static_cast<T>(p.scale)", RULE.format("plain")),
    Fault("the window's right side is shifted by one", SCORE,
          "clamp(lane - p.window_right, 0, kTile)",
          "clamp(lane - p.window_right + FAULT, 0, kTile)",
          "tests/ops/test_visibility.py::test_causal_is_bottom_right[cpu]"),
    Fault("the window's left side is shifted by one", SCORE,
          "clamp(lane + p.window_left + 1, 0, kTile)",
          "clamp(lane + p.window_left + 1 - FAULT, 0, kTile)",
          "tests/ops/test_visibility.py::test_windows_at_every_small_shape[cpu-(2, -1)]"),
    Fault("causal is aligned to the top left", SEQUENCE,
          ": len_k - len_q;", ": (FAULT ? 0 : len_k - len_q);",
          "tests/ops/test_visibility.py::test_causal_is_bottom_right[cpu]"),
    Fault("the query offset is added the other way round", SEQUENCE,
          "clamp(p.query_offset[b],", "clamp((FAULT ? -1 : 1) * int64_t{p.query_offset[b]},",
          "tests/ops/test_visibility.py::test_offsets_of_a_static_cache[cpu]"),
    Fault("the end of the key range is inclusive", SEQUENCE,
          "clamp(p.key_range[2 * b + 1],", "clamp(int64_t{p.key_range[2 * b + 1]} + FAULT,",
          "tests/ops/test_visibility.py::test_every_pair_of_ranges[cpu]"),
    Fault("the end of the query range is inclusive", SEQUENCE,
          "clamp(p.query_range[2 * b + 1],", "clamp(int64_t{p.query_range[2 * b + 1]} + FAULT,",
          RULE.format("query_range")),
    Fault("packed keys begin one row early", SEQUENCE,
          "first_k = begin_k;", "first_k = FAULT && begin_k > 0 ? begin_k - 1 : begin_k;",
          PACKED.format("plain")),
    Fault("query heads take the wrong key head", FORWARD,
          "task.head / (p.heads_q / p.heads_k)",
          "(FAULT ? task.head % p.heads_k : task.head / (p.heads_q / p.heads_k))", RULE.format("plain")),
    Fault("the running maximum moves without the output", FORWARD,
          "load(row + d) * rescale[i])", "load(row + d) * (FAULT ? T(1) : rescale[i]))", RULE.format("plain")),
    Fault("a row that sees nothing is divided by zero", FORWARD,
          "sees_nothing ? T(0) : T(1) / tile.sum[i]", "sees_nothing && !FAULT ? T(0) : T(1) / tile.sum[i]",
          "tests/ops/test_edges.py::test_rows_that_see_nothing[cpu-float32-mask]"),
    Fault("lse forgets the sink", FORWARD,
          "tile.maximum[i] + std::log(tile.sum[i]);",
          "tile.maximum[i] + std::log(tile.sum[i] - (FAULT && p.sink != nullptr ? std::exp(static_cast<const "
          "T*>(p.sink)[head] - tile.maximum[i]) : T(0)));", RULE.format("sink")),
    Fault("rows that are not computed have lse 0", FORWARD,
          "lse[i] = T(-kInfinity);", "lse[i] = FAULT ? T(0) : T(-kInfinity);", RULE.format("query_range")),
    Fault("the sink's gradient has the wrong sign", ROW_SUM,
          "sum -= std::exp(sink", "sum -= (FAULT ? -1 : 1) * std::exp(sink", RULE.format("sink")),
    Fault("lse's gradient has the wrong sign", ROW_SUM,
          "- (dlse != nullptr ? dlse[i] : T(0))", "- (dlse != nullptr ? (FAULT ? -dlse[i] : dlse[i]) : T(0))",
          "tests/ops/test_autograd.py::test_lse_alone_has_gradients[cpu-float32]"),
    Fault("ALiBi rises with the distance", SCORE,
          "-= slope * static_cast<T>", "-= (FAULT ? -slope : slope) * static_cast<T>", RULE.format("alibi")),
    Fault("ALiBi's slopes of one batch entry serve all", SCORE,
          "t.batch * p.alibi_batch_stride", "(FAULT ? 0 : t.batch) * p.alibi_batch_stride", RULE.format("alibi_batch")),
    Fault("the derivative of softcap is missing", SCORE,
          "T(1) - t * t)", "T(1) - (FAULT ? t * T(0) : t * t))", RULE.format("softcap")),
    Fault("the backward forgets the bias", SCORE,
          "if (p.bias.data != nullptr) {", "if (p.bias.data != nullptr && !(FAULT && p.dq.data != nullptr)) {",
          RULE.format("bias")),
    Fault("the gradient of a broadcast bias is not summed over the rows", BACKWARD,
          "++i) sum += dscores[j * kTile + i];", "++i) sum = dscores[j * kTile + i] + (FAULT ? T(0) : sum);",
          RULE.format("bias_keys")),
    Fault("the mask means hidden", SCORE,
          "from[i * mask.row + j] != 0", "(from[i * mask.row + j] != 0) != FAULT", RULE.format("mask")),
    Fault("the backward draws with another seed", SCORE,
          "seed = dropout_seed(p);", "seed = dropout_seed(p) + (FAULT && p.dq.data != nullptr);",
          DROPOUT.format("test_backward_drops_the_same_for_dv[cpu-float32-16-16]")),
    Fault("the factor 256 / keep is missing", SCORE,
          "T(256) / T(keep)", "(FAULT ? T(1) : T(256) / T(keep))", RULE.format("dropout")),
    Fault("one byte value too many is kept", SCORE,
          "keep = p.dropout_keep;", "keep = p.dropout_keep + FAULT;",
          DROPOUT.format("test_forward_drops_what_the_reference_drops[cpu-float32-0.5-131-250]")),
    Fault("batch entries share masks", SCORE,
          "static_cast<uint32_t>(t.batch) * static_cast<uint32_t>(p.heads_q)",
          "static_cast<uint32_t>(t.batch) * static_cast<uint32_t>(FAULT ? 0 : p.heads_q)",
          DROPOUT.format("test_forward_drops_what_the_reference_drops[cpu-float32-0.5-16-16]")),
    Fault("dropout does not reach dP", BACKWARD,
          "dprobability *= factor;", "if (!FAULT) dprobability *= factor;",
          DROPOUT.format("test_backward_drops_the_same_for_dq_and_dk[cpu-float32-16-16]")),
    Fault("the gradient of lse is lost on the way", OPS,
          "_BACKWARD(dout, dlse, q, k, v,", "_BACKWARD(dout, None if FAULT else dlse, q, k, v,",
          "tests/ops/test_autograd.py::test_lse_alone_has_gradients[cpu-float32]"),
    Fault("the gradient of a missing out is one", OPS,
          "dout = torch.zeros_like(out)", "dout = torch.full_like(out, FAULT)",
          "tests/ops/test_autograd.py::test_lse_alone_has_gradients[cpu-float32]"),
    Fault("the backward's window is open to the right", OPS,
          "out, lse, *ctx.numbers,",
          "out, lse, *((*ctx.numbers[:3], -1, *ctx.numbers[4:]) if FAULT else ctx.numbers),",
          RULE.format("causal")),
    Fault("the gradient of a bias is taken for that of sinks", OPS,
          "*tensors, *needs)", "*tensors, *(needs[::-1] if FAULT else needs))",
          "tests/ops/test_autograd.py::test_gradients_of_some_inputs[cpu-float32]"),
    Fault("gradients are rows before heads", BINDINGS,
          "  if (tail.heads_first) {", "  if (tail.heads_first && !FAULT) {",
          "tests/ops/test_autograd.py::test_heads_before_rows[cpu-float32-False]"),
    Fault("the rate of dropout is rounded down", ATTENTION,
          "math.floor(256 * (1 - dropout_p) + 0.5)", "math.floor(256 * (1 - dropout_p) + (0 if FAULT else 0.5))",
          DROPOUT.format("test_forward_drops_what_the_reference_drops[cpu-float32-0.97-131-250]")),
    Fault("causal is forgotten beside a window", ATTENTION,
          "        0 if causal else window[1],", "        0 if causal and not FAULT else window[1],",
          RULE.format("window_causal")),
]  # fmt: skip
