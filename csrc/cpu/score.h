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
  for (int i = t.queries.begin; i < t.queries.end; ++i) {
    const Element* __restrict row = from + (int64_t{t.row0} + i) * bias.row + int64_t{t.col0} * bias.col;
    for (int j = t.keys.begin; j < t.keys.end; ++j) added[j * kTile + i] += to_compute(row[j * bias.col]);
  }
}

// Returns whether the mask leaves anything to see.
template <class T>
bool add_mask(T* __restrict added, const Scores& mask, const TilePlace& t) {
  const uint8_t* from = static_cast<const uint8_t*>(mask.data) + t.batch * mask.batch + t.head * mask.head;
  bool visible = false;
  for (int i = t.queries.begin; i < t.queries.end; ++i) {
    const uint8_t* __restrict row = from + (int64_t{t.row0} + i) * mask.row + int64_t{t.col0} * mask.col;
    for (int j = t.keys.begin; j < t.keys.end; ++j) {
      const bool sees = row[j * mask.col] != 0;
      visible |= sees;
      added[j * kTile + i] = sees ? added[j * kTile + i] : T(-kInfinity);
    }
  }
  return visible;
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

// factor[key][query] = 256 / keep where dropout keeps the element, 0 where it drops it. One Philox call serves 16
// elements of a 16 x 16 block (attention/dropout.h): 16 calls fill a block.
template <class T>
void fill_dropout(T* __restrict factor, const AttentionParams& p, const TilePlace& t) {
  const uint64_t seed = static_cast<uint64_t>(*p.dropout_seed);
  const uint32_t plane = static_cast<uint32_t>(t.batch) * static_cast<uint32_t>(p.heads_q) + t.head;
  const T kept = T(256) / T(p.dropout_keep);
  for (int j0 = round_down(t.keys.begin, 16); j0 < t.keys.end; j0 += 16) {
    for (int i0 = round_down(t.queries.begin, 16); i0 < t.queries.end; i0 += 16) {
      uint32_t word[4][16];  // lane 4 b + a of the calls
      for (uint32_t lane = 0; lane < 16; ++lane) {
        const Philox4 w =
            philox_7(seed, 4 * (lane % 4) + lane / 4, uint32_t(t.row0 + i0) / 16, uint32_t(t.col0 + j0) / 16, plane);
        for (int x = 0; x < 4; ++x) word[x][lane] = w.word[x];
      }
      uint32_t pair[2][32];  // [j % 2][8 b + i % 8]
      for (int y = 0; y < 2; ++y)
        for (int lane = 0; lane < 16; ++lane) {
          pair[y][2 * lane] = word[y][lane];
          pair[y][2 * lane + 1] = word[2 + y][lane];
        }
      for (int j = 0; j < 16; ++j) {
        const uint32_t* words = &pair[j % 2][8 * ((j % 8) / 2)];
        T* to = factor + (j0 + j) * kTile + i0;
        for (int i = 0; i < 16; ++i) {
          const uint32_t byte = (words[i % 8] >> (16 * (i / 8) + 8 * (j / 8))) & 0xFF;
          to[i] = static_cast<int32_t>(byte) < p.dropout_keep ? kept : T(0);
        }
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
