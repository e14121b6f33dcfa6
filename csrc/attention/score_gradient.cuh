// The backward's element-wise mathematics, on transposed tiles (rows are keys, columns queries): from the raw products
// S = K Q^T and dP = V dO^T to the probabilities and the scores' gradient
//   P = exp(s - lse),   dS = P (dP - row_sum),   with dropout dP and the P of dV masked.
// Kept values' factor 256 / keep is left out: row_sum comes divided by it, and dQ, dK, dV are multiplied at their ends.
#pragma once

#include "attention/dropout_fragment.cuh"
#include "attention/score.cuh"

namespace hf_flash {

// lse in log2 units; +inf for a row that sees nothing or is not computed, so that exp2(s - lse) is 0 and never NaN.
__device__ __forceinline__ float lse_for_gradient(float lse) {
  return lse == -CUDART_INF_F ? CUDART_INF_F : lse * kLog2E;
}

// Gradients of the score before and after the softcap: the tanh's derivative 1 - (s / c)^2 as float16 pairs.
template <int ROWS, int COLS>
struct SoftcapSlopes {
  uint32_t x[ROWS / 16][COLS / 8][2];

  // s: scores in log2 units after the softcap, before anything is added.
  __device__ __forceinline__ void keep(const Accumulator<ROWS, COLS>& s, float softcap) {
    const float inverse = 1.0f / (softcap * kLog2E);
    const auto slope = [&](float y) { return 1.0f - (y * inverse) * (y * inverse); };
    for_each_pair(
        [&](uint32_t& pair, int m, int n, int e) { pair = pack<Half>(slope(s.x[m][n][e]), slope(s.x[m][n][e + 1])); });
  }
  __device__ __forceinline__ void multiply(Accumulator<ROWS, COLS>& ds) {
    for_each_pair([&](uint32_t& pair, int m, int n, int e) {
      const float2 slope = unpack<Half>(pair);
      ds.x[m][n][e] *= slope.x;
      ds.x[m][n][e + 1] *= slope.y;
    });
  }

 private:
  template <class F>
  __device__ __forceinline__ void for_each_pair(F f) {
#pragma unroll
    for (int m = 0; m < ROWS / 16; ++m) {
#pragma unroll
      for (int n = 0; n < COLS / 8; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) f(x[m][n][r], m, n, 2 * r);
      }
    }
  }
};

// Where the gradient of a bias goes that broadcasts nowhere. Sums need a kernel of their own (dbias_sums).
struct BiasGradient {
  float* data;  // of one batch and head; null: not asked for, or not here
  int64_t row, col;
  float factor;

  __device__ BiasGradient(const AttentionParams& p, int b, int h)
      : data(nullptr), row(p.dbias.row), col(p.dbias.col), factor(256.0f / p.dropout_keep) {
    if (p.dbias.data != nullptr && !p.dbias_sums) {
      data = static_cast<float*>(p.dbias.data) + b * p.dbias.batch + h * p.dbias.head;
    }
  }
  template <int ROWS, int COLS>
  __device__ __forceinline__ void store(Accumulator<ROWS, COLS>& ds, const Sequence& sequence, int i0, int j0) const {
    ds.for_each([&](float& x, int key, int query) {
      const int i = i0 + query, j = j0 + key;
      if (i < sequence.len_q && j < sequence.len_k) data[i * row + j * col] = x * factor;
    });
  }
};

// BYTEWISE: exponentiate() looks up the bytes of what it drops one by one; compared four at once they would take two
// registers more. EVERY: as in ScoreExtras, and dropout may be off.
template <class T, bool DROPOUT, bool EXTRAS, bool BYTEWISE = EXTRAS, bool EVERY = EXTRAS>
struct ScoreGradient {
  const AttentionParams& p;
  const Sequence& sequence;
  const FragmentDropout<true> dropout;  // of this batch and head
  const int b, h;

  __device__ ScoreGradient(const AttentionParams& p, const Sequence& sequence, int b, int h)
      : p(p), sequence(sequence), dropout(p, b * p.heads_q + h), b(b), h(h) {}

  // s, dp: raw products of keys j0 .. and queries i0 .. of query head h; lse (as above) and row_sum of those queries.
  // Leaves the probabilities that enter dV in s and the gradient of scale * q.k in dp. seen: the keys' seen_keys().
  // add_bias(s): adds the bias to scores in log2 units and says so, or says that it was left out.
  template <int ROWS, int COLS, class AddBias>
  __device__ __forceinline__ void apply(Accumulator<ROWS, COLS>& s, Accumulator<ROWS, COLS>& dp, const float* lse,
                                        const float* row_sum, int i0, int j0, bool boundary, const uint32_t* seen,
                                        const AddBias& add_bias) const {
    if constexpr (!EXTRAS) {
      if (boundary) hide_invisible<true>(s, p, sequence, i0, j0, *seen);
      differentiate(s, dp, lse, row_sum, i0, j0, static_cast<float>(p.scale) * kLog2E);
    } else {
      ScoreExtras<T, true, EVERY> extras(p, b, h);
      SoftcapSlopes<ROWS, COLS> slopes;
      extras.scale_and_cap(s);
      if (EVERY && p.softcap != 0) slopes.keep(s, static_cast<float>(p.softcap));
      if (add_bias(s)) extras.bias = nullptr;
      extras.add(s, sequence, i0, j0);
      if (boundary) hide_invisible<true>(s, p, sequence, i0, j0, *seen);
      differentiate(s, dp, lse, row_sum, i0, j0, 1.0f);
      const BiasGradient bias(p, b, h);
      if (EVERY && bias.data != nullptr) bias.store(dp, sequence, i0, j0);
      if (EVERY && p.softcap != 0) slopes.multiply(dp);
    }
  }

  // apply() in two halves, without the extra terms, for kernels that get dp later than s; a warp's 16 keys. First:
  // scores that count as s * factor in log2 units to probabilities. What dropout drops comes out negative. lse and
  // row_sum begin at this lane's first query.
  template <int COLS>
  __device__ __forceinline__ void exponentiate(Accumulator<16, COLS>& s, const float* lse, float factor, int i0,
                                               int j0) const {
    if (!DROPOUT || (EVERY && dropout.keep >= 256)) {
      exponentiate<false>(s, lse, factor, i0, j0);
    } else {
      exponentiate<true>(s, lse, factor, i0, j0);
    }
  }

  // Second: leaves the probabilities that enter dV in s and the gradient of scale * q.k in dp.
  template <int COLS>
  __device__ static __forceinline__ void differentiate(Accumulator<16, COLS>& s, Accumulator<16, COLS>& dp,
                                                       const float* row_sum) {
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n) {
      const float2 delta = *reinterpret_cast<const float2*>(row_sum + 8 * n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& probability = s.x[0][n][e];
        float& gradient = dp.x[0][n][e];
        const float row_delta = e % 2 ? delta.y : delta.x;
        if constexpr (DROPOUT) {
          const float lost = fabsf(probability) * row_delta;
          probability = max_or_nan(probability, 0.0f);
          gradient = probability * gradient - lost;
        } else {
          gradient = probability * (gradient - row_delta);
        }
      }
    }
  }

 private:
  template <bool DROPS, int COLS>
  __device__ __forceinline__ void exponentiate(Accumulator<16, COLS>& s, const float* lse, float factor, int i0,
                                               int j0) const {
    DropoutWords words;
#pragma unroll
    for (int block = 0; block < COLS / 16; ++block) {
      uint2 dropped;
      if constexpr (DROPS) {
        if (block % 2 == 0) words = dropout.draw((i0 >> 4) + block, j0 >> 4, (i0 >> 4) + block + 1, j0 >> 4);
        if (!BYTEWISE) dropped = dropout.dropped(words, block % 2);
      }
#pragma unroll
      for (int n = 2 * block; n < 2 * block + 2; ++n) {
        const float2 row_lse = *reinterpret_cast<const float2*>(lse + 8 * n);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = s.x[0][n][e];
          x = exp2_fast(x * factor - (e % 2 ? row_lse.y : row_lse.x));
          if constexpr (DROPS && BYTEWISE) {
            if (!dropout.keeps(words, block % 2, n, e)) x = -x;
          } else if constexpr (DROPS) {
            x = __uint_as_float(__float_as_uint(x) | dropout.sign_if_dropped(dropped, n, e));
          }
        }
      }
    }
  }

  template <int ROWS, int COLS>
  __device__ __forceinline__ void differentiate(Accumulator<ROWS, COLS>& s, Accumulator<ROWS, COLS>& dp,
                                                const float* lse, const float* row_sum, int i0, int j0,
                                                float factor) const {
    constexpr int kM = ROWS / 16;
    const bool drops = DROPOUT && (!EVERY || p.dropout_keep < 256);
    DropoutWords words;
#pragma unroll
    for (int block = 0; block < kM * COLS / 16; ++block) {  // 16 x 16 blocks, those of one query block side by side
      const int m = block % kM;
      if constexpr (DROPOUT) {
        if (drops && block % 2 == 0) {
          words =
              dropout.draw(i0 / 16 + block / kM, j0 / 16 + m, i0 / 16 + (block + 1) / kM, j0 / 16 + (block + 1) % kM);
        }
      }
#pragma unroll
      for (int n = 2 * (block / kM); n < 2 * (block / kM) + 2; ++n) {
        const float2 row_lse = *reinterpret_cast<const float2*>(lse + 8 * n + lane_col());
        const float2 row_delta = *reinterpret_cast<const float2*>(row_sum + 8 * n + lane_col());
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& probability = s.x[m][n][e];
          float& gradient = dp.x[m][n][e];
          probability = exp2_fast(probability * factor - (e % 2 ? row_lse.y : row_lse.x));
          bool kept = true;
          if constexpr (DROPOUT) kept = !drops || dropout.keeps(words, block % 2, n, e);
          gradient = probability * ((kept ? gradient : 0.0f) - (e % 2 ? row_delta.y : row_delta.x));
          if (!kept) probability = 0.0f;
        }
      }
    }
  }
};

}  // namespace hf_flash
