// Dropout in the forward. Warps of the producer's warpgroup, which have little else to do, draw for all consumers and
// pack what they draw into one bit an element: a consumer loads a word for 64 keys. Beside the extras each consumer
// draws for itself while it takes the exponentials.
#pragma once

#include "attention/dropout_fragment.cuh"
#include "sm90/forward_layout.cuh"

namespace hf_flash::sm90 {

// One of the drawing warps. They share each tile's rows.
template <class Traits>
struct DropoutDrawer {
  using Plan = ForwardPlan<Traits>;

  const AttentionParams& p;
  const ForwardShared<Traits>& shared;
  const uint32_t drawer;
  const uint64_t seed;
  uint32_t plans = 0, tiles = 0;  // pieces of work and key tiles that are done
  int next = -1;                  // key tile of the piece of work at hand, -1 at its beginning

  // The seed is the same for all: in uniform registers, and outside any condition.
  __device__ DropoutDrawer(const AttentionParams& p, const ForwardShared<Traits>& shared, int drawer)
      : p(p), shared(shared), drawer(drawer), seed(uniform(*p.dropout_seed)) {}

  // All pieces of work, as far ahead of the consumers as the ring of bits allows.
  __device__ __forceinline__ void draw_all() {
    for (;;) {
      shared.planned.wait_full(plans);
      const int row0 = uniform(shared.plan(plans).row0);
      if (row0 < 0) return;
      // All that is read of the plan: it is overwritten some time after the consumers have its last tile's bits.
      const int begin = uniform(shared.plan(plans).tiles.begin), end = uniform(shared.plan(plans).tiles.end);
      const uint32_t batch_head = batch_head_of(shared.plan(plans));
      for (int tile = end - 1; tile >= begin; --tile) draw_tile(row0, batch_head, tile);
      ++plans;
    }
  }

  // By the warp that makes the plans: one tile of those already made.
  __device__ __forceinline__ void draw_next() {
    const Plan& plan = shared.plan(plans);
    const int row0 = uniform(plan.row0), begin = uniform(plan.tiles.begin), end = uniform(plan.tiles.end);
    const int tile = next < 0 ? end - 1 : next;
    draw_tile(row0, batch_head_of(plan), tile);
    next = tile > begin ? tile - 1 : -1;
    plans += tile == begin;
  }

 private:
  __device__ __forceinline__ uint32_t batch_head_of(const Plan& plan) const {
    return uniform(plan.batch * p.heads_q + plan.head);
  }

  __device__ __forceinline__ void draw_tile(int row0, uint32_t batch_head, int tile) {
    shared.bits.wait_empty(tiles);
    if (p.dropout_keep < 128) {
      draw_words<true>(row0, batch_head, tile);
    } else {
      draw_words<false>(row0, batch_head, tile);
    }
    __syncwarp();
    shared.bits.release_full(tiles);
    ++tiles;
  }

  // One Philox call serves two consumer lanes in a 16 x 16 block, (g, t) = (2 a, b) by words 0 and 1, (2 a + 1, b) by
  // words 2 and 3. A lane here makes the four calls of 64 keys and has a whole word for each of the two. Block k of the
  // four takes bit 7 - 2k (even columns) and bit 6 - 2k (odd) of each byte; the bytes stay where the contract has them
  // (dropout.h). BELOW_128: is keep?
  template <bool BELOW_128>
  __device__ __forceinline__ void draw_words(int row0, uint32_t batch_head, int tile) const {
    constexpr uint32_t kFlags = 0x80808080u;
    DropoutLimit limit(p.dropout_keep);
    limit.below_128 = BELOW_128 ? 0xFFFFFFFFu : 0u;  // a constant: an instruction less for each drawn word
    const uint32_t lane = threadIdx.x % 32, half = lane / 16, ab = lane % 16;  // 16 lanes a row block
    const uint32_t own_word = shared.bits_word(tiles, half, 0) + 4 * (8 * (ab / 4) + ab % 4);
    // Words inside row blocks: the other way round ptxas keeps more of what repeats than there are registers.
#pragma unroll 1
    for (uint32_t pair = drawer; pair < Traits::kRows / 32; pair += Traits::kDrawers) {
#pragma unroll 1
      for (uint32_t word = 0; word < Traits::kBitWords; ++word) {
        uint32_t even = 0, odd = 0;
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) {
          if (Traits::kKeys % 64 != 0 && 64 * word + 16 * k >= Traits::kKeys) continue;
          const uint32_t i_block = row0 / 16u + 2 * pair + half, j_block = tile * (Traits::kKeys / 16) + 4 * word + k;
          const Philox4 drawn = philox_7(seed, ab, i_block, j_block, batch_head);
          even |= (limit.dropped(drawn.word[0]) & kFlags) >> 2 * k;
          even |= (limit.dropped(drawn.word[1]) & kFlags) >> (2 * k + 1);
          odd |= (limit.dropped(drawn.word[2]) & kFlags) >> 2 * k;
          odd |= (limit.dropped(drawn.word[3]) & kFlags) >> (2 * k + 1);
        }
        const uint32_t address = own_word + (2 * pair * Traits::kBitWords + word) * Traits::kBitWordBytes;
        store_shared(address, even);
        store_shared(address + 4 * 4, odd);
      }
    }
  }
};

// What the producer drew for this lane's share of a tile: bits that say what is dropped.
template <class Traits>
struct DrawnBits {
  static constexpr int kWords = Traits::kBitWords;
  uint32_t word[kWords];

  __device__ __forceinline__ void load(const ForwardShared<Traits>& shared, uint32_t place) {
    const uint32_t address = shared.bits_word(place, threadIdx.x / 32, 0) + 4 * (threadIdx.x % 32);
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = load_shared(address + w * Traits::kBitWordBytes);
  }
  // Register q of a block holds byte 2 (q % 2) + q / 2: e / 2 = q % 2, n % 2 = q / 2; e % 2 = 0 is its lower half.
  __device__ __forceinline__ void apply(OperandA<16, Traits::kKeys>& probabilities) const {
#pragma unroll
    for (int block = 0; block < Traits::kKeys / 16; ++block) {
      const uint32_t x = word[block / 4] << 2 * (block % 4), y = word[block / 4] << (2 * (block % 4) + 1);
      uint32_t (&a)[4] = probabilities.x[0][block];
      a[0] &= ~copy_signs<0xCC88>(x, y);
      a[1] &= ~copy_signs<0xEEAA>(x, y);
      a[2] &= ~copy_signs<0xDD99>(x, y);
      a[3] &= ~copy_signs<0xFFBB>(x, y);
    }
  }
};

// What a consumer draws for itself, two 16 x 16 blocks side by side a draw. Masks are made where they are needed: as
// words they take half the registers.
template <class Traits>
struct DrawnWords {
  static constexpr int kBlocks = Traits::kKeys / 16, kDraws = (kBlocks + 1) / 2;
  DropoutWords words[Traits::kDropout ? kDraws : 1];

  // The draw that serves keys 32 n .. 32 n + 31 of the tile.
  __device__ __forceinline__ void draw(const FragmentDropout<false>& dropout, int i_block, int j_block, int n) {
    words[n] = dropout.draw(i_block, j_block + 2 * n, i_block, j_block + 2 * n + 1);
  }
  __device__ __forceinline__ void apply(const FragmentDropout<false>& dropout,
                                        OperandA<16, Traits::kKeys>& probabilities) const {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t mask[4];
      dropout.masks(mask, words[block / 2], block % 2);
#pragma unroll
      for (int x = 0; x < 4; ++x) probabilities.x[0][block][x] &= mask[x];
    }
  }
};

}  // namespace hf_flash::sm90
