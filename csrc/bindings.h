// Tensor -> AttentionParams for bindings.cpp: a call's arguments in the schema's order and the checks that protect
// memory. The sentences that users should see come earlier, from hf_flash/support.py.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/sequence.h"
#include "params.h"

namespace hf_flash::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void append(std::string& text, const char* word) { text += word; }
inline void append(std::string& text, int64_t number) { text += std::to_string(number); }

// A tensor stands for its shape.
inline void append(std::string& text, const Tensor& t) {
  text += "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  text += ")";
}

// Throws the words as one sentence where the condition fails; puts nothing together where it holds.
template <class... Words>
void require(bool condition, const Words&... words) {
  if (condition) return;
  std::string sentence = "hf_flash: ";
  (append(sentence, words), ...);
  throw std::runtime_error(sentence);
}

// A boxed call's arguments, taken in the schema's order. Each must be taken once: taking owns the reference.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

// The tail that forward and backward share; members stand in the schema's order. What most calls leave out comes last
// and has a default, since torch looks at each argument that Python passes, None too.
constexpr const char* kTailSchema =
    "float scale, bool heads_first=False, SymInt window_left=-1, SymInt window_right=-1, int dropout_keep=256, "
    "int dropout_seed_value=0, float softcap=0.0, bool deterministic=False, SymInt max_seqlen_q=0, "
    "SymInt max_seqlen_k=0, Tensor? key_range=None, Tensor? mask=None, Tensor? query_range=None, "
    "Tensor? query_offset=None, Tensor? dropout_seed=None, Tensor? alibi_slopes=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? bias=None, Tensor? sink=None";

struct Tail {
  explicit Tail(Arguments& args)
      : scale(args.take<double>()),
        heads_first(args.take<bool>()),
        window_left(args.take<int64_t>()),
        window_right(args.take<int64_t>()),
        dropout_keep(args.take<int64_t>()),
        dropout_seed_value(args.take<int64_t>()),
        softcap(args.take<double>()),
        deterministic(args.take<bool>()),
        max_seqlen_q(args.take<int64_t>()),
        max_seqlen_k(args.take<int64_t>()),
        key_range(args.take<OptionalTensor>()),
        mask(args.take<OptionalTensor>()),
        query_range(args.take<OptionalTensor>()),
        query_offset(args.take<OptionalTensor>()),
        dropout_seed(args.take<OptionalTensor>()),
        alibi_slopes(args.take<OptionalTensor>()),
        cu_seqlens_q(args.take<OptionalTensor>()),
        cu_seqlens_k(args.take<OptionalTensor>()),
        bias(args.take<OptionalTensor>()),
        sink(args.take<OptionalTensor>()) {}

  double scale;
  bool heads_first;  // q, k, v and their gradients are (B, H, S, D)
  int64_t window_left, window_right, dropout_keep, dropout_seed_value;
  double softcap;
  bool deterministic;
  int64_t max_seqlen_q, max_seqlen_k;
  OptionalTensor key_range, mask, query_range, query_offset, dropout_seed, alibi_slopes, cu_seqlens_q, cu_seqlens_k,
      bias, sink;
};

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    default: break;
  }
  require(false, name, " must be float16, bfloat16, float32 or float64");
  return DType::kFloat32;
}

inline ScalarType accumulator_of(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline void require_device(const Tensor& t, const Tensor& q, const char* name) {
  require(t.is_cuda() == q.is_cuda() && t.get_device_index() == q.get_device_index(), name,
          " is on another device than q; move it there first");
}

// (B, H, S, D) as (B, S, H, D) and back, over the same memory. torch's own transposition looks an operator up by name.
inline Tensor swapped(const Tensor& t) {
  require(t.dim() == 4, "q, k and v must be (B, H, S, D) with heads_first; got ", t);
  const int64_t sizes[4] = {t.size(0), t.size(2), t.size(1), t.size(3)};
  const int64_t strides[4] = {t.stride(0), t.stride(2), t.stride(1), t.stride(3)};
  AtenTensorHandle handle = nullptr;
  require(aoti_torch__reinterpret_tensor(t.get(), 4, sizes, strides, 0, &handle) == 0, "torch gave no view of ", t);
  return Tensor(handle);
}

// Kernels read rows with a contiguous last dimension; the GPU's read 16 bytes at a time. What does not fit is copied.
inline Tensor kernel_ready(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  bool fits = t.stride(last) == 1 || t.size(last) == 1;
#ifdef HF_FLASH_CUDA
  const int64_t elements = 16 / static_cast<int64_t>(t.element_size());
  for (int64_t d = 0; d < last; ++d) fits = fits && (t.size(d) <= 1 || t.stride(d) % elements == 0);
  // Rows that all lie at one place have no tensor map; heads and batch entries may.
  const int64_t rows = last - 2;
  fits = fits && (rows < 0 || t.size(rows) <= 1 || t.stride(rows) != 0);
  const bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  if (fits && !aligned) return torch::stable::clone(torch::stable::contiguous(t));
#endif
  return fits ? t : torch::stable::contiguous(t);
}

inline Rows rows_of(const Tensor& t) {
  return t.dim() == 3 ? Rows{t.data_ptr(), 0, t.stride(0), t.stride(1)}
                      : Rows{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// One value a row in memory of our own, laid out as lse is.
inline RowValues row_values_at(void* data, const AttentionParams& p) {
  return p.packed() ? RowValues{data, 0, p.total_q} : RowValues{data, int64_t{p.heads_q} * p.seqlen_q, p.seqlen_q};
}

inline RowValues row_values_of(const Tensor& t) {
  return t.dim() == 2 ? RowValues{t.data_ptr(), 0, t.stride(0)} : RowValues{t.data_ptr(), t.stride(0), t.stride(1)};
}

inline Scores scores_of(const Tensor& t, DType dtype) {
  const auto stride = [&](int64_t d) { return t.size(d) == 1 ? int64_t{0} : t.stride(d); };
  return {t.data_ptr(), stride(0), stride(1), stride(2), stride(3), dtype};
}

// (B, S, H) of a padded call, or (number of sequences, longest, H) of a packed one.
struct Shape {
  bool packed;
  int64_t batch, seqlen_q, seqlen_k;
  std::vector<int64_t> row_values;  // of lse and of the row sums

  Shape(const Tensor& q, const Tensor& k, const Tail& tail) : packed(tail.cu_seqlens_q.has_value()) {
    require(tail.cu_seqlens_k.has_value() == packed, "cu_seqlens_q and cu_seqlens_k must be given together");
    require(q.dim() == (packed ? 3 : 4), "q must be (B, Sq, Hq, D), or (T, Hq, D) with cu_seqlens; got ", q);
    require(k.dim() == q.dim(), "k ", k, " must have as many dimensions as q");
    batch = packed ? std::max<int64_t>(0, tail.cu_seqlens_q->numel() - 1) : q.size(0);
    seqlen_q = packed ? std::min(tail.max_seqlen_q, q.size(0)) : q.size(1);
    seqlen_k = packed ? std::min(tail.max_seqlen_k, k.size(0)) : k.size(1);
    require(seqlen_q <= kLongest && seqlen_k <= kLongest, "a sequence may have at most 2^28 rows; q has ", seqlen_q,
            ", k ", seqlen_k);
    row_values =
        packed ? std::vector<int64_t>{q.size(1), q.size(0)} : std::vector<int64_t>{q.size(0), q.size(2), q.size(1)};
  }
};

inline void check_rows(const Tensor& q, const Tensor& k, const Tensor& v, const Shape& shape) {
  require(v.dim() == q.dim(), "v ", v, " must have as many dimensions as q");
  require_device(k, q, "k");
  require_device(v, q, "v");
  require(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "k and v must have q's dtype");
  const int64_t head = q.dim() - 2, dim = q.dim() - 1;
  for (int64_t d = 0; d < dim; ++d)
    require(k.size(d) == v.size(d), "k ", k, " and v ", v, " must agree up to the last dimension");
  require(shape.packed || k.size(0) == q.size(0), "k ", k, " must have q's batch size ", q.size(0));
  require(k.size(dim) == q.size(dim), "k ", k, " must have q's head_dim ", q.size(dim));
  require(k.size(head) > 0 && q.size(head) % k.size(head) == 0, "q's heads (", q.size(head),
          ") must be a multiple of k's (", k.size(head), ")");
  for (const Tensor* t : {&q, &v})
    require(t->size(dim) % 8 == 0 && t->size(dim) > 0 && t->size(dim) <= 256,
            "head_dim must be a multiple of 8 up to 256; got ", t->size(dim));
  require(q.size(0) <= INT32_MAX && q.size(1) <= INT32_MAX && k.size(0) <= INT32_MAX && k.size(1) <= INT32_MAX,
          "no dimension may exceed 2^31 - 1");
}

inline const void* vector_of(const OptionalTensor& t, const Tensor& q, ScalarType dtype, int64_t numel,
                             const char* name) {
  if (!t) return nullptr;
  require_device(*t, q, name);
  require(t->scalar_type() == dtype, name, " has the wrong dtype");
  require(t->numel() == numel && t->is_contiguous(), name, " must be contiguous with ", numel, " values; got shape ",
          *t);
  return t->data_ptr();
}

inline void check_scores(const Tensor& t, const Tensor& q, const int64_t (&full)[4], const char* name) {
  require_device(t, q, name);
  require(t.dim() == 4, name, " must have 4 dimensions; got ", t);
  for (int64_t d = 0; d < 4; ++d)
    require(t.size(d) == 1 || t.size(d) == full[d], name, " ", t, " does not broadcast to (", full[0], ", ", full[1],
            ", ", full[2], ", ", full[3], ")");
}

inline void fill_tail(AttentionParams& p, const Tail& tail, const Tensor& q, const Shape& shape) {
  const int64_t batch = shape.batch, heads = p.heads_q;
  const int64_t full[4] = {batch, heads, shape.packed ? tail.max_seqlen_q : shape.seqlen_q,
                           shape.packed ? tail.max_seqlen_k : shape.seqlen_k};
  if (tail.bias) {
    check_scores(*tail.bias, q, full, "bias");
    p.bias = scores_of(*tail.bias, dtype_of(*tail.bias, "bias"));
    require(p.bias.dtype == p.dtype || p.bias.dtype == DType::kFloat32, "bias must have q's dtype or float32");
  }
  if (tail.mask) {
    check_scores(*tail.mask, q, full, "mask");
    require(tail.mask->scalar_type() == ScalarType::Bool, "mask must be bool, True where a key is visible");
    p.mask = scores_of(*tail.mask, DType::kFloat32);
  }
  if (tail.alibi_slopes) {
    const bool per_batch = tail.alibi_slopes->dim() == 2;
    p.alibi_slopes = static_cast<const float*>(
        vector_of(tail.alibi_slopes, q, ScalarType::Float, per_batch ? batch * heads : heads, "alibi_slopes"));
    p.alibi_batch_stride = per_batch ? heads : 0;
  }
  p.sink = vector_of(tail.sink, q, accumulator_of(p.dtype), heads, "sink");
  const auto ints = [&](const OptionalTensor& t, int64_t numel, const char* name) {
    return static_cast<const int32_t*>(vector_of(t, q, ScalarType::Int, numel, name));
  };
  p.cu_seqlens_q = ints(tail.cu_seqlens_q, batch + 1, "cu_seqlens_q");
  p.cu_seqlens_k = ints(tail.cu_seqlens_k, batch + 1, "cu_seqlens_k");
  p.key_range = ints(tail.key_range, 2 * batch, "key_range");
  p.query_range = ints(tail.query_range, 2 * batch, "query_range");
  p.query_offset = ints(tail.query_offset, batch, "query_offset");
  require(!(shape.packed && (p.key_range || p.query_range)), "key_range and query_range do not go with cu_seqlens");
  require(tail.dropout_keep >= 1 && tail.dropout_keep <= 256, "dropout_keep must lie in 1..256");
  p.dropout_seed = static_cast<const int64_t*>(vector_of(tail.dropout_seed, q, ScalarType::Long, 1, "dropout_seed"));
  p.dropout_seed_value = tail.dropout_seed_value;
  p.dropout_keep = static_cast<int32_t>(tail.dropout_keep);
  p.scale = tail.scale;
  p.softcap = tail.softcap;
  // A window wider than any distance is no window; the clamp keeps sums of positions inside 32 bits.
  p.window_left = static_cast<int32_t>(tail.window_left < 0 ? -1 : std::min<int64_t>(tail.window_left, 1 << 30));
  p.window_right = static_cast<int32_t>(tail.window_right < 0 ? -1 : std::min<int64_t>(tail.window_right, 1 << 30));
  p.deterministic = tail.deterministic;
}

inline AttentionParams params_of(const Tensor& q, const Tensor& k, const Tensor& v, const Shape& shape,
                                 const Tail& tail) {
  check_rows(q, k, v, shape);
  AttentionParams p{};
  p.dtype = dtype_of(q, "q");
  p.batch = static_cast<int32_t>(shape.batch);
  p.heads_q = static_cast<int32_t>(q.size(q.dim() - 2));
  p.heads_k = static_cast<int32_t>(k.size(k.dim() - 2));
  p.seqlen_q = static_cast<int32_t>(shape.seqlen_q);
  p.seqlen_k = static_cast<int32_t>(shape.seqlen_k);
  p.head_dim = static_cast<int32_t>(q.size(q.dim() - 1));
  p.head_dim_v = static_cast<int32_t>(v.size(v.dim() - 1));
  p.total_q = shape.packed ? q.size(0) : q.size(0) * q.size(1);
  p.total_k = shape.packed ? k.size(0) : k.size(0) * k.size(1);
  p.q = rows_of(q);
  p.k = rows_of(k);
  p.v = rows_of(v);
  fill_tail(p, tail, q, shape);
  return p;
}

// How a bias lies over the scores that kernels compute.
struct BiasBroadcast {
  bool sums = false;    // an element of it meets several scores
  bool reached = true;  // it has no rows or columns past the longest sequence's

  BiasBroadcast(const Tensor& bias, const AttentionParams& p) {
    const int64_t full[4] = {p.batch, p.heads_q, p.seqlen_q, p.seqlen_k};
    for (int64_t d = 0; d < 4; ++d) {
      sums = sums || (bias.size(d) == 1 && full[d] > 1);
      reached = reached && (bias.size(d) == 1 || bias.size(d) <= full[d]);
    }
  }
};

// A new contiguous tensor on like's device. The stable ABI's new_empty looks its operator up by name and boxes every
// argument, which takes the host twice as long.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  constexpr int64_t kMost = 4;
  int64_t strides[kMost], stride = 1;
  const int64_t dims = static_cast<int64_t>(sizes.size());
  require(dims <= kMost, "a new tensor has at most 4 dimensions");
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  int32_t device = 0;
  AtenTensorHandle handle = nullptr;
  require(aoti_torch_get_device_type(like.get(), &device) == 0 &&
              aoti_torch_empty_strided(dims, sizes.data(), strides, static_cast<int32_t>(dtype), device,
                                       like.get_device_index(), &handle) == 0,
          "torch could not allocate a tensor of ", stride, " elements");
  return Tensor(handle);
}

inline Tensor made_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline std::vector<int64_t> shape_with_last(const Tensor& like, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < like.dim(); ++d) sizes.push_back(like.size(d));
  sizes.push_back(last);
  return sizes;
}

inline bool has_shape(const Tensor& t, const std::vector<int64_t>& sizes) {
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == sizes[d];
  return fits;
}

}  // namespace hf_flash::bindings
