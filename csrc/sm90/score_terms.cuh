// The terms that most calls do without, in Hopper's forward: softcap, ALiBi, bias, bool mask. What belongs to single
// elements comes through shared memory: read from global memory in the accumulators' layout, eight rows an instruction,
// it would keep the load unit busy for as long as the products take. The producer copies a bias that the TMA engine can
// read; anything else (float32, masks, broadcast or unaligned rows) each warp stages for its own rows.
#pragma once

#include <math_constants.h>

#include <type_traits>

#include "attention/score.cuh"
#include "sm90/forward_layout.cuh"
#include "sm90/score_math.cuh"

namespace hf_flash::sm90 {

// The bits of -inf; without the sign those of +inf.
template <class Bits, class T>
constexpr Bits kMinusInfinity = sizeof(Bits) == 4             ? 0xFF800000u
                                : std::is_same_v<T, BFloat16> ? 0xFF80u
                                                              : 0xFC00u;

// Four neighbouring elements of a row.
template <class Bits>
struct alignas(4 * sizeof(Bits)) Four {
  Bits x[4];
};

// Elements j .. j + 3 of a row; WHOLE: they lie aligned side by side, else past the end the last one again.
template <bool WHOLE, class Bits>
__device__ __forceinline__ Four<Bits> load_four(const Bits* row, int64_t col, int j, int length) {
  Four<Bits> four;
  if constexpr (WHOLE) {
    four = *reinterpret_cast<const Four<Bits>*>(row + j);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) four.x[e] = row[min(j + e, length - 1) * col];
  }
  return four;
}

// Elements where the bool mask is false become -inf. Four bytes at once: bit 7 says "not zero", and its copies choose.
template <class T>
__device__ __forceinline__ void hide_unseen(Four<uint16_t>& four, uint32_t mask) {
  constexpr uint32_t kHidden = kMinusInfinity<uint16_t, T> * 0x10001u;
  const uint32_t seen = ((mask & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | mask;
  uint2& pairs = reinterpret_cast<uint2&>(four);
  const uint32_t low = copy_signs<0x9988>(seen), high = copy_signs<0xBBAA>(seen);
  pairs.x = (pairs.x & low) | (kHidden & ~low);
  pairs.y = (pairs.y & high) | (kHidden & ~high);
}
template <class T>
__device__ __forceinline__ void hide_unseen(Four<uint32_t>& four, uint32_t mask) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    four.x[e] = (mask >> (8 * e) & 0xFF) != 0 ? four.x[e] : kMinusInfinity<uint32_t, T>;
  }
}

template <class Traits>
struct ScoreTerms {
  using T = typename Traits::T;
  using Plan = ForwardPlan<Traits>;
  using Tile = typename Traits::ScoreTile;
  static constexpr int kKeys = Traits::kKeys;
  static constexpr bool kEveryTerm = Traits::kEveryTerm;
  using Scores = Accumulator<16, kKeys>;

  const AttentionParams& p;
  const ForwardShared<Traits>& shared;
  const ScoreConstants& constants;
  const int warpgroup;

  __device__ ScoreTerms(const AttentionParams& p, const ForwardShared<Traits>& shared, const ScoreConstants& constants,
                        int warpgroup)
      : p(p), shared(shared), constants(constants), warpgroup(warpgroup) {}

  __device__ __forceinline__ int warp_row() const { return first_row_of_warp(warpgroup); }
  __device__ __forceinline__ bool wide() const { return p.bias.data != nullptr && p.bias.dtype == DType::kFloat32; }

  // Raw products of the tile at (query i0, key j0), `place` in the rings, become scores that count as s * factor in
  // log2 units.
  __device__ __forceinline__ void apply(Scores& s, const Plan& plan, uint32_t place, int i0, int j0) const {
    float scale = constants.scale;
    if (kEveryTerm && constants.cap != 0) {
      cap_scores(s, constants);
      scale = 1.0f;
    } else if (kEveryTerm && !(scale > 0)) {
      s.for_each([&](float& x, int, int) { x *= constants.scale; });
      scale = 1.0f;
    }
    if (p.alibi_slopes != nullptr) {
      add_alibi(s, scale, plan.slope, i0 + plan.sequence.offset - j0);
      scale = 1.0f;
    }
    if (constants.copies_bias) {
      shared.scores.wait_full(place);
      for_each_pair(shared.score_tile(place), [&](int n, int e, float2 x) { add(s.x[0][n], e, scale, x); });
      __syncwarp();
      shared.scores.release(place);
    } else if constexpr (kEveryTerm) {
      add_staged(s, scale);
    }
  }

  // A bias of the lowest finite numbers, which callers use to mean "hardly visible", overflows in log2 units. That
  // matters where a row has nothing above it. top: the lanes' maxima.
  __device__ __forceinline__ void keep_lowest_visible(Scores& s, RowVector<16>& top) const {
    if (p.bias.data == nullptr) return;
    const auto low = [](float x) { return x < kLowestBias && x != -CUDART_INF_F; };
    if (!any_lane(low(top.v[0]) || low(top.v[1]))) return;
    s.for_each([&](float& x, int, int) { x = low(x) ? kLowestBias : x; });
    top.v[0] = low(top.v[0]) ? kLowestBias : top.v[0];
    top.v[1] = low(top.v[1]) ? kLowestBias : top.v[1];
  }

  // Before apply(): this warp's rows of a bias that the producer does not copy, -inf where the mask hides; of a mask
  // alone +inf or -inf.
  __device__ __forceinline__ void stage(const Plan& plan, int i0, int j0) const {
    if (!kEveryTerm || constants.copies_bias || (p.bias.data == nullptr && p.mask.data == nullptr)) return;
    __syncwarp();
    if (wide()) {
      stage_rows<uint32_t>(plan, i0, j0);
    } else {
      stage_rows<uint16_t>(plan, i0, j0);
    }
    __syncwarp();
  }

 private:
  __device__ __forceinline__ void add_staged(Scores& s, float scale) const {
    if (wide()) {
      finish_copies();
      for_each_wide_pair([&](int n, int e, float2 x) { add_or_hide(s.x[0][n], e, scale, x); });
    } else if (p.bias.data != nullptr) {
      finish_copies();
      for_each_pair(shared.score_tile(0), [&](int n, int e, float2 x) { add_or_hide(s.x[0][n], e, scale, x); });
    } else if (p.mask.data != nullptr) {
      for_each_pair(shared.score_tile(0), [&](int n, int e, float2 x) {
        s.x[0][n][e] = fminf(s.x[0][n][e], x.x);
        s.x[0][n][e + 1] = fminf(s.x[0][n][e + 1], x.y);
      });
    }
  }

  __device__ static __forceinline__ void add(float (&s)[4], int e, float scale, float2 x) {
    s[e] = s[e] * scale + x.x;
    s[e + 1] = s[e + 1] * scale + x.y;
  }
  // -inf hides even a score that is NaN. Written with a minimum: ptxas would predicate a choice, and hold registers for
  // it all round the loop. A visible NaN becomes the bound, and NaN again when the bound overflows in log2 units.
  __device__ static __forceinline__ void add_or_hide(float (&s)[4], int e, float scale, float2 x) {
    add(s, e, scale, x);
    s[e] = fminf(s[e], x.x + kBound);
    s[e + 1] = fminf(s[e + 1], x.y + kBound);
  }
  static constexpr float kBound = 3.0e38f;

  template <class F>
  __device__ __forceinline__ void for_each_pair(uint32_t tile, F f) const {
    for_each_score_pair<T, Tile>(tile, warpgroup, f);
  }
  __device__ __forceinline__ uint32_t narrow_address(int row, int col) const {
    return shared.score_tile(0) + Tile::offset(warp_row() + row, col / 8) + col % 8 * 2;
  }
  // Rows of float32 have two tiles to themselves.
  __device__ __forceinline__ uint32_t wide_address(int row, int chunk) const {
    return shared.score_tile(0) + (warp_row() + row) * 4 * kKeys + ((chunk ^ (row % 4 * 2)) << 4);
  }
  template <class F>
  __device__ __forceinline__ void for_each_wide_pair(F f) const {
    const int lane = opaque(threadIdx.x % 32);
    const uint32_t address = wide_address(lane / 4, lane % 4 / 2) + lane % 2 * 8;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        f(n, 2 * r, load_shared_float2((address ^ (n % 4 * 32)) + n / 4 * 128 + r * 8 * 4 * kKeys));
      }
    }
  }

  // Lanes a row, rows a load and loads of four elements a lane.
  static constexpr int kLanes = kKeys / 4, kRows = 32 / kLanes, kStagedLoads = 16 / kRows;

  template <class Bits>
  __device__ __forceinline__ void stage_rows(const Plan& plan, int i0, int j0) const {
    const Bits* bias = static_cast<const Bits*>(p.bias.data) + plan.batch * p.bias.batch + plan.head * p.bias.head;
    const uint8_t* mask =
        static_cast<const uint8_t*>(p.mask.data) + plan.batch * p.mask.batch + plan.head * p.mask.head;
    const bool whole = aligned(bias, p.bias) && aligned(mask, p.mask) && j0 + kKeys <= plan.sequence.len_k;
    if (whole && p.mask.data == nullptr) {
      copy_rows(bias, plan.sequence, i0, j0);
    } else if (whole) {
      constexpr int kAtOnce = 16 / sizeof(Bits) < kStagedLoads ? 16 / sizeof(Bits) : kStagedLoads;
      stage_rows<true, kAtOnce>(bias, mask, plan.sequence, i0, j0);
    } else {
      stage_rows<false, 2>(bias, mask, plan.sequence, i0, j0);
    }
  }

  // Without a register in between: finish_copies() waits.
  template <class Bits>
  __device__ __forceinline__ void copy_rows(const Bits* bias, const Sequence& sequence, int i0, int j0) const {
    const int lane = opaque(threadIdx.x % 32), first = lane / kLanes, col = 4 * (lane % kLanes);
#pragma unroll 2
    for (int n = 0; n < kStagedLoads; ++n) {
      const int row = first + n * kRows, i = min(i0 + row, sequence.len_q - 1);
      const Bits* from = bias + i * p.bias.row + (j0 + col);
      if constexpr (sizeof(Bits) == 4) {
        copy_async_16_bytes(wide_address(row, col / 4), from, 16);
      } else {
        copy_async_8_bytes(narrow_address(row, col), from);
      }
    }
    copy_async_commit();
  }
  __device__ static __forceinline__ void finish_copies() {
    copy_async_wait<0>();
    __syncwarp();
  }

  // AT_ONCE: loads in flight.
  template <bool WHOLE, int AT_ONCE, class Bits>
  __device__ __forceinline__ void stage_rows(const Bits* bias, const uint8_t* mask, const Sequence& sequence, int i0,
                                             int j0) const {
    constexpr Bits kSeen = kMinusInfinity<Bits, T> & static_cast<Bits>(-1) >> 1;
    const int lane = opaque(threadIdx.x % 32), col = 4 * (lane % kLanes);
#pragma unroll 1
    for (int first = lane / kLanes; first < 16; first += AT_ONCE * kRows) {
      Four<Bits> value[AT_ONCE];
      Four<uint8_t> visible[AT_ONCE];
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) value[n] = {kSeen, kSeen, kSeen, kSeen};
      const auto row = [&](int n) { return min(i0 + first + n * kRows, sequence.len_q - 1); };
      if (p.bias.data != nullptr) {
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n)
          value[n] = load_four<WHOLE>(bias + row(n) * p.bias.row, p.bias.col, j0 + col, sequence.len_k);
      }
      if (p.mask.data != nullptr) {
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n)
          visible[n] = load_four<WHOLE>(mask + row(n) * p.mask.row, p.mask.col, j0 + col, sequence.len_k);
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) hide_unseen<T>(value[n], reinterpret_cast<const uint32_t&>(visible[n]));
      }
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) store(first + n * kRows, col, value[n]);
    }
  }

  template <class Bits>
  __device__ static __forceinline__ bool aligned(const Bits* first, const ::hf_flash::Scores& x) {
    const bool at_four = x.row % 4 == 0 && reinterpret_cast<uintptr_t>(first) % sizeof(Four<Bits>) == 0;
    return x.data == nullptr || (x.col == 1 && at_four);
  }

  __device__ __forceinline__ void store(int row, int col, const Four<uint16_t>& x) const {
    store_shared_8_bytes(narrow_address(row, col), reinterpret_cast<const uint2&>(x));
  }
  __device__ __forceinline__ void store(int row, int col, const Four<uint32_t>& x) const {
    store_shared_16_bytes(wide_address(row, col / 4), reinterpret_cast<const uint4&>(x));
  }
};

}  // namespace hf_flash::sm90
