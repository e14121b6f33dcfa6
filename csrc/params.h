// What one call of the attention operator hands to a kernel: plain data, the shape beside every pointer.
// Names: B batch (number of sequences when packed), Hq and Hk heads of q and of k/v, Sq and Sk rows, D and Dv head
// dimensions, T total rows of a packed batch. Strides count elements; a broadcast or expanded dimension has stride 0.
#pragma once

#include <cstdint>

namespace hf_flash {

// What a compiled variant of a kernel can add to scale * q.k: nothing; what is linear in it, ALiBi and a bias
// (sm90/instances.h); or all that a call may ask for.
enum class Terms { kNone, kLinear, kEvery };

enum class DType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

// A tensor of rows, (B, S, H, D) or packed (T, H, D); the last dimension is contiguous. Packed tensors have batch = 0.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t row = 0;
  int64_t head = 0;
};

// A tensor that broadcasts to (B, Hq, Sq, Sk): a dimension of size 1 has stride 0. In a packed batch row and col
// count from each sequence's start.
struct Scores {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
  int64_t col = 0;
  DType dtype = DType::kFloat32;  // unused for the bool mask
};

// One value a query row: lse and the backward's row sums, (B, Hq, Sq) or packed (Hq, T), contiguous along the rows.
struct RowValues {
  void* data = nullptr;  // float32; float64 when q is float64
  int64_t batch = 0;     // 0 when packed
  int64_t head = 0;
};

struct AttentionParams {
  DType dtype;         // of q, k, v, out and their gradients
  int32_t batch;       // B
  int32_t heads_q;     // Hq, a multiple of heads_k
  int32_t heads_k;     // Hk
  int32_t seqlen_q;    // Sq; packed: max_seqlen_q, an upper bound of every sequence's length
  int32_t seqlen_k;    // Sk; packed: max_seqlen_k
  int32_t head_dim;    // D
  int32_t head_dim_v;  // Dv
  int64_t total_q;     // rows in q's storage: B * Sq, or T of q
  int64_t total_k;     // rows in k's storage: B * Sk, or T of k

  Rows q;         // (B, Sq, Hq, D)
  Rows k;         // (B, Sk, Hk, D)
  Rows v;         // (B, Sk, Hk, Dv)
  Rows out;       // (B, Sq, Hq, Dv)
  RowValues lse;  // natural logarithm of the row's sum of exponentials, the sink included

  Scores bias;                          // (B|1, Hq|1, Sq|1, Sk|1), q's dtype or float32, added to the score; -inf hides
  Scores mask;                          // (B|1, Hq|1, Sq|1, Sk|1), bool (one byte), true = visible
  const uint8_t* key_mask = nullptr;    // (B|1, Sk), 0 = hidden: mask's data where take_key_mask() found it to be one
  const float* alibi_slopes = nullptr;  // (Hq) or (B, Hq); the batch stride is below
  int64_t alibi_batch_stride = 0;       // 0 for (Hq)
  const void* sink = nullptr;           // (Hq), float32, or float64 when q is float64; in natural units

  const int32_t* cu_seqlens_q = nullptr;  // (B + 1), packed batches only
  const int32_t* cu_seqlens_k = nullptr;  // (B + 1)
  const int32_t* key_range = nullptr;     // (B, 2): key_begin, key_end
  const int32_t* query_range = nullptr;   // (B, 2)
  const int32_t* query_offset = nullptr;  // (B): position of query row 0 among the keys; null means Sk - Sq

  double scale;                           // s = scale * q.k
  double softcap;                         // 0: none; otherwise s = softcap * tanh(s / softcap)
  int32_t window_left;                    // -1: unlimited
  int32_t window_right;                   // -1: unlimited; 0: causal
  int32_t dropout_keep;                   // of 256; 256 means no dropout
  const int64_t* dropout_seed = nullptr;  // one value, on the tensors' device; null: the next member counts
  int64_t dropout_seed_value = 0;         // drawn on the host

  // Backward only.
  Rows dout;                  // (B, Sq, Hq, Dv), any strides with a contiguous last dimension
  RowValues dlse;             // gradient of lse; data is null when there is none
  RowValues row_sum;          // workspace: sum over Dv of dout * out, minus dlse
  Rows dq, dk, dv;            // like q, k, v, contiguous
  Scores dbias;               // bias's own shape, stride 0 where its size is 1; float32 (float64 for float64), zeroed
  bool dbias_sums = false;    // bias broadcasts. On a GPU dbias then has bias's dtype and is not zeroed
  void* dsink = nullptr;      // (Hq) float32 (float64 for float64), zeroed; null when not asked for
  void* workspace = nullptr;  // as many bytes as the architecture's backward_workspace() asked for
  bool deterministic = false;
  int32_t key_head_parts = 1;  // so many neighbours among heads_k share k and v (attention/key_head_parts.h)

  // A mask of keys alone is no term of the score for kernels that look at it where they look at the ranges: at the edge
  // of what is visible. Its strides stay in mask.
  void take_key_mask() {
    if (mask.data == nullptr || mask.head != 0 || mask.row != 0 || mask.col != 1) return;
    key_mask = static_cast<const uint8_t*>(mask.data);
    mask.data = nullptr;
  }

  bool packed() const { return cu_seqlens_q != nullptr; }
  bool ragged() const { return packed() || key_range != nullptr; }  // sequences may differ in their keys
  bool drops() const { return dropout_keep < 256; }
  // More than scale * q.k in a score. A scale that is not positive counts: such scores are scaled before anything is
  // hidden or compared.
  bool has_extras() const {
    return softcap != 0 || bias.data != nullptr || mask.data != nullptr || alibi_slopes != nullptr || !(scale > 0);
  }
};

}  // namespace hf_flash
