// From products q.k to scores, for one tile [key][query]: softcap, ALiBi, bias, and what window and mask hide.
#pragma once

#include "cpu/tile.h"

namespace hf_flash::cpu::HF_FLASH_CPU_ISA {
namespace {

// Where a score tile lies in its sequence: query rows row0 + queries, key columns col0 + keys.
struct TilePlace {
  int32_t batch, head;
  int32_t row0, col0;
  Range queries;  // within 0..kTile
  Range keys;     // within 0..kTile, those that some query of the tile sees
};

enum class Added { kNothing, kSome, kHidesAll };

// Does the window hide any of the tile's pairs?
HF_FLASH_INLINE bool window_cuts(const AttentionParams& p, const Sequence& sequence, const TilePlace& t) {
  const int64_t first = int64_t{t.row0} + t.queries.begin + sequence.offset;
  const int64_t last = int64_t{t.row0} + t.queries.end - 1 + sequence.offset;
  const bool right = p.window_right >= 0 && int64_t{t.col0} + t.keys.end - 1 > first + p.window_right;
  const bool left = p.window_left >= 0 && int64_t{t.col0} + t.keys.begin < last - p.window_left;
  return left || right;
}

template <class T>
void add_alibi(T* added, const Sequence& sequence, const TilePlace& t, T slope) {
  for (int j = t.keys.begin; j < t.keys.end; ++j) {
    const int32_t distance = t.row0 + sequence.offset - (t.col0 + j);
    for (int i = 0; i < kTile; ++i) {
      const int32_t d = distance + i;
      added[j * kTile + i] -= slope * static_cast<T>(d < 0 ? -d : d);
    }
  }
}

template <class T, class Element>
void add_bias(T* __restrict added, const Scores& bias, const TilePlace& t) {
  const Element* from = static_cast<const Element*>(bias.data) + t.batch * bias.batch + t.head * bias.head;
  if (bias.row == 0) {
    for (int j = t.keys.begin; j < t.keys.end; ++j) {
      const T value = to_compute(from[(int64_t{t.col0} + j) * bias.col]);
      for (int i = 0; i < kTile; ++i) added[j * kTile + i] += value;
    }
    return;
  }
  from += t.row0 * bias.row + t.col0 * bias.col;
  const auto add = [=](int j, int i, Vector<T> x) { store<T>(added + j * kTile + i, load(added + j * kTile + i) + x); };
  if (bias.col == 1)  // known to the compiler, the reads become whole vectors
    for_each_column<T>(t.queries, t.keys, [=](int i, int j) { return T(to_compute(from[i * bias.row + j])); }, add);
  else
    for_each_column<T>(
        t.queries, t.keys, [=](int i, int j) { return T(to_compute(from[i * bias.row + j * bias.col])); }, add);
}

// Returns whether the mask leaves anything to see.
template <class T>
bool add_mask(T* __restrict added, const Scores& mask, const TilePlace& t) {
  const uint8_t* from = static_cast<const uint8_t*>(mask.data) + t.batch * mask.batch + t.head * mask.head +
                        t.row0 * mask.row + t.col0 * mask.col;
  Vector<T> visible = {};
  const auto hide = [=, &visible](int j, int i, Vector<T> sees) {
    T* to = added + j * kTile + i;
    visible = max<T>(visible, sees);
    store<T>(to, sees == T(0) ? splat<T>(-kInfinity) : load(to));
  };
  if (mask.row == 0) {
    for (int j = t.keys.begin; j < t.keys.end; ++j)
      for (int i = 0; i < kTile; i += kLanes<T>) hide(j, i, splat<T>(from[j * mask.col] != 0));
  } else if (mask.col == 1) {
    for_each_column<T>(t.queries, t.keys, [=](int i, int j) { return T(from[i * mask.row + j] != 0); }, hide);
  } else {
    for_each_column<T>(
        t.queries, t.keys, [=](int i, int j) { return T(from[i * mask.row + j * mask.col] != 0); }, hide);
  }
  T any = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) any += visible[lane];
  return any != T(0);
}

template <class T>
void add_window(T* added, const AttentionParams& p, const Sequence& sequence, const TilePlace& t) {
  for (int j = t.keys.begin; j < t.keys.end; ++j) {
    // The lanes that see key j: position - left <= j <= position + right.
    const int64_t lane = int64_t{t.col0} + j - sequence.offset - t.row0;
    const int first = p.window_right >= 0 ? clamp(lane - p.window_right, 0, kTile) : 0;
    const int end = p.window_left >= 0 ? clamp(lane + p.window_left + 1, 0, kTile) : kTile;
    for (int i = 0; i < kTile; ++i) {
      T& value = added[j * kTile + i];
      value = i >= first && i < end ? value : T(-kInfinity);
    }
  }
}

// Fills added[key][query] with all that is added to the tile's scores, -inf where a pair is hidden.
template <class Element>
Added fill_added(ComputeType<Element>* added, const AttentionParams& p, const Sequence& sequence, const TilePlace& t) {
  using T = ComputeType<Element>;
  const bool cut = window_cuts(p, sequence, t);
  if (!cut && p.bias.data == nullptr && p.mask.data == nullptr && p.alibi_slopes == nullptr) return Added::kNothing;
  std::memset(added + t.keys.begin * kTile, 0, sizeof(T) * kTile * (t.keys.end - t.keys.begin));
  if (p.alibi_slopes != nullptr)
    add_alibi(added, sequence, t, static_cast<T>(p.alibi_slopes[t.batch * p.alibi_batch_stride + t.head]));
  if (p.bias.data != nullptr) {
    if (p.bias.dtype == p.dtype)
      add_bias<T, Element>(added, p.bias, t);
    else
      add_bias<T, float>(added, p.bias, t);
  }
  if (p.mask.data != nullptr && !add_mask(added, p.mask, t)) return Added::kHidesAll;
  if (cut) add_window(added, p, sequence, t);
  return Added::kSome;
}

// scores = softcap * tanh(scores / softcap); slope, where asked for, gets the derivative.
template <class T>
void apply_softcap(T* scores, T softcap, Range keys, T* slope) {
  const T inverse = T(1) / softcap;
  for (int x = keys.begin * kTile; x < keys.end * kTile; x += kLanes<T>) {
    const Vector<T> t = tanh<T>(load(scores + x) * inverse);
    store<T>(scores + x, t * softcap);
    if (slope != nullptr) store<T>(slope + x, T(1) - t * t);
  }
}

// Adds; what is hidden becomes -inf whatever the product was, NaN too.
template <class T>
void apply_added(T* scores, const T* added, Range keys) {
  for (int x = keys.begin * kTile; x < keys.end * kTile; x += kLanes<T>) {
    const Vector<T> a = load(added + x);
    store<T>(scores + x, a == -kInfinity ? a : load(scores + x) + a);
  }
}

// The 16 Philox calls that fill a 16 x 16 block (attention/dropout.h). words[y][8 b + 2 a + x] is call 4 b + a's word
// 2 x + y, for the rows j with j % 2 = y; x = i % 2.
HF_FLASH_INLINE void draw_block(uint32_t (&words)[2][32], uint64_t seed, uint64_t block_i, uint64_t block_j,
                                uint64_t plane) {
  constexpr int kCalls = kLanes<double>;  // at once: each call's counter words stand in low halves of 64 bits
  for (int first = 0; first < 16; first += kCalls) {
    WideVector c0 = {}, c1 = WideVector{} + block_i, c2 = WideVector{} + block_j, c3 = WideVector{} + plane;
    for (int lane = 0; lane < kCalls; ++lane) c0[lane] = 4 * ((first + lane) % 4) + (first + lane) / 4;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round) {
      const WideVector product0 = multiply_low_halves(c0, 0xD2511F53u), product1 = multiply_low_halves(c2, 0xCD9E8D57u);
      c0 = (product1 >> 32) ^ c1 ^ key0;
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ key1;
      c3 = product0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    const WideVector low = WideVector{} + 0xFFFFFFFFu;
    const WideVector rows[2] = {(c0 & low) | (c2 << 32), (c1 & low) | (c3 << 32)};
    for (int y = 0; y < 2; ++y) std::memcpy(words[y] + 2 * first, &rows[y], sizeof rows[y]);
  }
}

// factor[key][query] = 256 / keep where dropout keeps the element, 0 where it drops it.
template <class T>
void fill_dropout(T* __restrict factor, const AttentionParams& p, const TilePlace& t) {
  const uint64_t seed = dropout_seed(p);
  const uint32_t plane = static_cast<uint32_t>(t.batch) * static_cast<uint32_t>(p.heads_q) + t.head;
  const int32_t keep = p.dropout_keep;
  const T kept = T(256) / T(keep);
  for (int j0 = round_down(t.keys.begin, 16); j0 < t.keys.end; j0 += 16) {
    for (int i0 = round_down(t.queries.begin, 16); i0 < t.queries.end; i0 += 16) {
      uint32_t words[2][32];
      draw_block(words, seed, uint32_t(t.row0 + i0) / 16, uint32_t(t.col0 + j0) / 16, plane);
      for (int j = 0; j < 16; ++j) {
        const uint32_t* row = words[j % 2] + 8 * ((j % 8) / 2);
        const int shift = 8 * (j / 8);
        T* to = factor + (j0 + j) * kTile + i0;
        for (int i = 0; i < 8; ++i) to[i] = int32_t((row[i] >> shift) & 0xFF) < keep ? kept : T(0);
        for (int i = 0; i < 8; ++i) to[8 + i] = int32_t((row[i] >> (shift + 16)) & 0xFF) < keep ? kept : T(0);
      }
    }
  }
}

template <class T>
void apply_dropout(T* tile, const T* factor, Range keys) {
  for (int x = keys.begin * kTile; x < keys.end * kTile; x += kLanes<T>)
    store<T>(tile + x, load(tile + x) * load(factor + x));
}

}  // namespace
}  // namespace hf_flash::cpu::HF_FLASH_CPU_ISA
