// Run-time values to compile-time constants: architecture, dtype, head dimension and variant.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention/key_head_parts.h"
#include "dispatch.h"
#include "instructions/element.cuh"
#include "portable/cuda_call.h"
#include "portable/portable.h"
#include "sm80/backward_config.h"
#include "sm80/instances.h"
#include "sm90/backward_grid.h"
#include "sm90/forward_tiles.h"
#include "sm90/instances.h"

namespace hf_flash::cuda {
namespace {

cudaStream_t native(void* stream) { return static_cast<cudaStream_t>(stream); }

enum class Arch { kSm80, kSm90 };

// The folder that serves the current device. HF_FLASH_ARCH forces one, for tests and for users who debug; it is read at
// every call.
Arch architecture() {
  const int major = compute_capability_major();
  if (major < 8)
    throw std::runtime_error("hf_flash: the CUDA kernels need compute capability 8.0 or newer; this device has " +
                             std::to_string(major) + ".x");
  const char* forced = std::getenv("HF_FLASH_ARCH");
  if (forced == nullptr || *forced == '\0') return major == 9 ? Arch::kSm90 : Arch::kSm80;
  if (std::strcmp(forced, "sm80") == 0) return Arch::kSm80;
  if (std::strcmp(forced, "sm90") != 0)
    throw std::runtime_error(std::string("hf_flash: HF_FLASH_ARCH is '") + forced + "'; this build has sm80 and sm90");
  if (major != 9)
    throw std::runtime_error(
        "hf_flash: HF_FLASH_ARCH is 'sm90', whose kernels need compute capability 9.0; this device "
        "has " +
        std::to_string(major) + ".x");
  return Arch::kSm90;
}

template <class Run>
void with_type(const AttentionParams& p, Run&& run) {
  if (p.dtype == DType::kFloat16) return run(Half{});
  if (p.dtype == DType::kBFloat16) return run(BFloat16{});
  throw std::runtime_error("hf_flash: the CUDA kernels take float16 or bfloat16; cast q, k and v, or use autocast");
}

template <int HEAD_DIM, class Run>
void with_variant(const AttentionParams& p, const Run& run) {
  const bool dropout = p.drops(), extras = p.has_extras();
  with_type(p, [&](auto element) {
    using T = decltype(element);
    if constexpr (Run::has_variants(HEAD_DIM)) {
      if (!extras && !dropout) return run.template operator()<T, HEAD_DIM, false, Terms::kNone>();
    }
    if constexpr (Run::has_variants(HEAD_DIM) && Run::kDropsAlone) {
      if (!extras) return run.template operator()<T, HEAD_DIM, true, Terms::kNone>();
    }
    if constexpr (Run::has_linear_terms(HEAD_DIM, false)) {
      if (!dropout && run.prefers_linear_terms()) return run.template operator()<T, HEAD_DIM, false, Terms::kLinear>();
    }
    if constexpr (Run::has_linear_terms(HEAD_DIM, true)) {
      if (dropout && run.prefers_linear_terms()) return run.template operator()<T, HEAD_DIM, true, Terms::kLinear>();
    }
    return run.template operator()<T, HEAD_DIM, true, Terms::kEvery>();
  });
}

int head_dim_of(const AttentionParams& p) {
  const int needed = std::max(p.head_dim, p.head_dim_v);
  for (const int head_dim : sm80::kHeadDims)
    if (needed <= head_dim) return head_dim;
  throw std::runtime_error("hf_flash: head_dim must be at most 256; got " + std::to_string(needed));
}

template <class Run>
void with_instance(const AttentionParams& p, const Run& run) {
  switch (head_dim_of(p)) {
    case 32: return with_variant<32>(p, run);
    case 64: return with_variant<64>(p, run);
    case 96: return with_variant<96>(p, run);
    case 128: return with_variant<128>(p, run);
    case 192: return with_variant<192>(p, run);
    case 256: return with_variant<256>(p, run);
  }
}

// What can be run on an instance: both folders' passes. kDropsAlone: dropout without extras is a variant of its own;
// has_linear_terms: so are ALiBi and bias without the rest, without or with dropout.
struct Pass {
  const AttentionParams& p;
  cudaStream_t stream;
  static constexpr bool kDropsAlone = true;
  static constexpr bool has_variants(int) { return true; }
  static constexpr bool has_linear_terms(int, bool) { return false; }
};

struct Sm80Pass : Pass {
  static constexpr bool has_variants(int head_dim) { return sm80::has_variants(head_dim); }
  static constexpr bool has_linear_terms(int head_dim, bool) { return sm80::has_linear_terms(head_dim); }
  bool prefers_linear_terms() const { return sm90::linear_terms_alone(p); }
};

struct Sm80Forward : Sm80Pass {
  template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
  void operator()() const {
    sm80::run_forward<T, HEAD_DIM, DROPOUT, TERMS>(p, stream);
  }
};

struct Sm80Backward : Sm80Pass {
  template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
  void operator()() const {
    sm80::run_backward<T, HEAD_DIM, DROPOUT, TERMS>(p, stream);
  }
};

struct Sm90Backward : Pass {
  static constexpr bool has_linear_terms(int head_dim, bool dropout) { return head_dim == 64 || !dropout; }
  bool prefers_linear_terms() const { return sm90::linear_terms_alone(p); }
  template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
  void operator()() const {
    static_assert(sm90::backward_head_dim(HEAD_DIM) == HEAD_DIM);
    sm90::run_backward<T, HEAD_DIM, DROPOUT, TERMS>(p, stream);
  }
};

struct Sm90WideBackward : Pass {
  static constexpr bool kDropsAlone = false;
  template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
  void operator()() const {
    static_assert(sm90::backward_head_dim(HEAD_DIM) == HEAD_DIM);
    sm90::run_wide_backward<T, HEAD_DIM, DROPOUT, TERMS>(p, stream);
  }
};

struct Sm90Forward : Pass {
  static constexpr bool has_linear_terms(int head_dim, bool) { return head_dim == 64; }
  bool prefers_linear_terms() const {
    if (!sm90::linear_terms_alone(p)) return false;
    const auto small = sm90::small_tiles(false, true);  // the kernel of every term's; with dropout both have them
    return p.drops() || !sm90::prefers_small_tiles(p, small, multiprocessor_count());
  }
  template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
  void operator()() const {
    sm90::run_forward<T, HEAD_DIM, DROPOUT, TERMS>(p, stream);
  }
};

}  // namespace

void forward(const AttentionParams& p, void* stream) {
  const Arch arch = architecture();
  if (p.packed()) portable::fill_gaps_forward(p, native(stream));
  if (arch == Arch::kSm90) return with_instance(p, Sm90Forward{{p, native(stream)}});
  with_instance(p, Sm80Forward{{{p, native(stream)}}});
}

// The head dimension of Hopper's backward for this call, 0 where the mma.sync kernels serve it.
static int hopper_head_dim(const AttentionParams& p) {
  if (architecture() != Arch::kSm90) return 0;
  return sm90::backward_head_dim(std::max(p.head_dim, p.head_dim_v));
}

// The call that the kernels get: perhaps one of more heads of k, parts of p's, whose dk and dv lie in the workspace
// behind what dq is summed in.
static AttentionParams split_key_heads(const AttentionParams& p, int hopper) {
  int keys = 0, ctas = multiprocessor_count();
  if (hopper > 0) {
    keys = sm90::keys_of_work(p, hopper);
    ctas /= sm90::team_of(p, hopper);
  } else {
    const auto config = sm80::backward_config(head_dim_of(p), p.has_extras() ? Terms::kEvery : Terms::kNone,
                                              compute_capability_major() == 9);
    keys = config.keys;
    ctas *= config.blocks_per_sm;
  }
  AttentionParams parts = p;
  parts.key_head_parts = key_head_parts(p, keys, ctas);
  parts.heads_k *= parts.key_head_parts;
  return parts;
}
static int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }
static int64_t bytes_of_dk(const AttentionParams& p) { return aligned(p.total_k * p.heads_k * p.head_dim * 2); }
static int64_t bytes_of_dv(const AttentionParams& p) { return aligned(p.total_k * p.heads_k * p.head_dim_v * 2); }
static Rows parts_at(void* data, const AttentionParams& p, int64_t dim) {
  const int64_t row = p.heads_k * dim;
  return {data, p.packed() ? 0 : p.seqlen_k * row, row, dim};
}

// What dq is summed in.
static int64_t accumulator_bytes(const AttentionParams& p, int hopper) {
  if (hopper == 0) return DqAccumulator(p, nullptr, head_dim_of(p)).bytes(p);
  const sm90::BackwardGrid grid(p, hopper, multiprocessor_count());
  if (grid.relays()) return 0;
  // stores_first in place of the rows that are stored first: how many they are does not change the size.
  if (grid.tall)
    return TallDqAccumulator(p, nullptr, hopper, grid.finishes_dq, grid.stores_first, grid.zeroes_ahead).bytes(p);
  return DqAccumulator(p, nullptr, hopper, grid.finishes_dq, grid.stores_first, grid.zeroes_ahead).bytes(p);
}

int64_t backward_workspace(const AttentionParams& p) {
  const int hopper = hopper_head_dim(p);
  const AttentionParams parts = split_key_heads(p, hopper);
  const int64_t own = accumulator_bytes(parts, hopper);
  return parts.key_head_parts == 1 ? own : aligned(own) + bytes_of_dk(parts) + bytes_of_dv(parts);
}

static void bias_gradient(const AttentionParams& p, cudaStream_t stream) {
  const bool hopper = architecture() == Arch::kSm90 && sm90::has_bias_gradient(p);
  const bool linear = sm90::linear_terms_alone(p);
  with_type(p, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto dropout, auto terms) {
      if (hopper) return sm90::run_bias_gradient<T, dropout(), terms()>(p, stream);
      sm80::run_bias_gradient<T, dropout(), terms()>(p, stream);
    };
    using Linear = std::integral_constant<Terms, Terms::kLinear>;
    if (!linear) return run(std::true_type(), std::integral_constant<Terms, Terms::kEvery>());
    p.drops() ? run(std::true_type(), Linear()) : run(std::false_type(), Linear());
  });
}

void backward(const AttentionParams& whole, void* stream) {
  const int hopper = hopper_head_dim(whole);
  AttentionParams p = split_key_heads(whole, hopper);
  if (p.key_head_parts > 1) {
    char* const behind = static_cast<char*>(p.workspace) + aligned(accumulator_bytes(p, hopper));
    p.dk = parts_at(behind, p, p.head_dim);
    p.dv = parts_at(behind + bytes_of_dk(p), p, p.head_dim_v);
  }
  if (p.packed()) portable::fill_gaps_backward(p, native(stream));
  switch (hopper) {
    case 64: with_variant<64>(p, Sm90Backward{{p, native(stream)}}); break;
    case 128: with_variant<128>(p, Sm90Backward{{p, native(stream)}}); break;
    case 192: with_variant<192>(p, Sm90WideBackward{{p, native(stream)}}); break;
    case 256: with_variant<256>(p, Sm90WideBackward{{p, native(stream)}}); break;
    default: with_instance(p, Sm80Backward{{{p, native(stream)}}});
  }
  if (p.key_head_parts > 1) portable::add_key_head_parts(p, whole, native(stream));
  if (p.dbias_sums) bias_gradient(whole, native(stream));
}

void key_ranges(const AttentionParams& p, int32_t* ranges, void* stream) {
  architecture();  // refuses a device that is too old in our words
  portable::key_ranges(p, ranges, native(stream));
}

void row_sum(const AttentionParams& p, void* stream) { portable::row_sum(p, DqAccumulator{}, native(stream)); }

}  // namespace hf_flash::cuda
