// Tile sizes of the wgmma kernels: one table a pass, the reason beside each number.
#pragma once

#include "params.h"

namespace hf_flash::sm90 {

// What comes first once a tile's scores are there: the end of P V of the tile before, so that exponentials, sums and
// the rounding of P are one block of instructions; the exponentials, beside P V; or whichever ptxas likes.
enum class Order { kFree, kOutput, kExponentials };

struct ForwardConfig {
  int warpgroups;  // consumers, 64 query rows each
  int keys;        // keys a tile
  int stages;      // tiles of K, and as many of V, in shared memory
  int q_stages;    // tiles of Q: with 2 the next one arrives while this one is at work
  bool turns;      // warpgroups take turns at the tensor cores, so that the softmax of one hides behind the others
  Order order = Order::kFree;
  bool moves_descriptors = true;  // to uniform registers (tile/swizzled_tile.cuh); otherwise ptxas does
  int bias_stages = 2;            // tiles of a bias, with extras; float32 rows take two
  int first_keys = 0;             // whose exponentials come before the end of P V although that comes first
};

// Does the forward do without a tile's own maximum (forward_again.cuh)? Beside the products of the other warpgroups the
// maxima took a quarter of a softmax's time. D 64 S 512 / 1024 / 2048 / 8192 +4, 8, 7, 8 %, causal 4096 and 8192 +7; D
// 128 +3 to +7, causal 1024 0, 2048 and 8192 +4 to +9, 512 -2. With dropout D 64 +3 to +6 %, D 128 +4 to +11. Tiles of
// 128 rows at D 64 -1 to +4 % at best.
constexpr bool trusts_max(int head_dim, bool extras, bool small) { return !extras && !small && head_dim <= 128; }

constexpr ForwardConfig forward_config(int head_dim, bool dropout, bool extras, bool small) {
#ifdef HF_FLASH_SM90_FORWARD_CONFIG  // for sweeps
  return HF_FLASH_SM90_FORWARD_CONFIG;
#endif
  // Without the terms that need registers of their own a third warpgroup fits: S 2048 ALiBi 299 -> 403, a bias 278 ->
  // 341 TFLOP/s, of which the shorter code alone gives 358 and 283.
  if (extras && !dropout) return {3, 128, 2, 2, true, Order::kOutput};
  // Extras: two tiles of a bias share the memory. Blocks of 64 keys, as a bias is copied, where registers allow it.
  if (extras && head_dim <= 64) return {2, 128, 4, 2, true};
  if (extras) return {2, head_dim <= 128 ? 128 : head_dim <= 192 ? 64 : 32, 2, 1, true};
  // Three warpgroups leave 160 registers a thread: enough for S, P and O at D 64; dropout's masks come after P. Their
  // turns gain 6 % at S 2048 and more: softmax and products take equally long.
  if (head_dim <= 64 && !small) return {3, 128, 4, 2, true, Order::kOutput};
  // Whose registers descriptors are in: small tiles gain 4 % by ptxas's own moves, dropout loses 8 %, others -1 to 0 %.
  // Without dropout turns cost small tiles 3 % from S 384 on and gain 1 % below.
  if (head_dim <= 64) return {2, 128, 4, 2, dropout, dropout ? Order::kExponentials : Order::kOutput, !small};
  // Here the products take longer than the softmax. With turns and the output first 3 to 5 % are gained at S 8192 and
  // more and under a causal mask, and descriptors left to ptxas gain 1 to 3 %. With dropout (S 2048) both gain 8 %.
  if (head_dim <= 128 && dropout) return {2, 128, 2, 2, true, Order::kOutput};
  // The exponentials of 32 or 40 keys before the end of P V: D 128 S 512, 1024, 2048, 8192 +1, 4, 7, 9 %, causal 0, -1,
  // 4, 8, D 96 2048 and 8192 +5 and 7, causal 3 and 7. Of 48 or 56 keys 0 to 7 % less; D 64 -1 to -5 %, dropout -1 to
  // -13, D 192 and 256 -3 to +1.
  if (head_dim <= 128) return {2, 128, 2, 2, true, Order::kOutput, false, 2, head_dim <= 96 ? 32 : 40};
  // At D 192 the output first gains 7 % everywhere, at D 256 nothing.
  if (head_dim <= 192) return {2, dropout ? 64 : 96, 2, 1, true, Order::kOutput};
  return {2, dropout ? 64 : 80, 2, 1, true};
}

// Are there forward kernels that know no mask of keys, beside those that do? The code that hides what it hides is
// rarely run, but ptxas orders all else differently for it: D 64, S 256 323 against 280 to 304 TFLOP/s, 512 379 against
// 366 to 372, 2048 456 against 438 to 444, D 128 1 to 3 %.
constexpr bool masks_apart(int head_dim, bool extras) { return !extras && (head_dim == 64 || head_dim == 128); }

// Are there tiles of 128 rows beside those of 192?
constexpr bool has_small_tiles(int head_dim, bool extras) { return head_dim <= 64 && !extras; }

// When they serve (forward_tiles.h).
struct SmallTiles {
  float row_cost;    // time of a row in them, in that of a row in the others
  int up_to_causal;  // queries, from where on a causal triangle is large
};

constexpr SmallTiles small_tiles(bool dropout, bool extras) {
  // The linear terms in the kernel of every term, which has tiles of 128 rows: S 512 320 against 311 under a causal
  // mask, 2048 490 against 624.
  if (extras) return {1.25f, 512};
  // Causal, S 512 257 against 181 TFLOP/s, 1024 329 against 268, 2048 388 against 409; with dropout 200, 251, 281 and
  // 306 against 136, 194, 264 and 301 at 512 to 4096.
  return {dropout ? 1.09f : 1.25f, dropout ? 2048 : 1536};
}

// Keys of a CTA of the backward: the accumulators of dK and dV fill the registers of two warpgroups.
constexpr int backward_keys(int head_dim) { return head_dim <= 128 ? 128 : 64; }

// Do two CTAs share the keys of both? Over head dimension 128 the additions to dQ bind, as many bytes for 64 keys as
// for 128: S 2048, 4096, 8192, 16384 +26, 30, 35, 31 %, causal +15, 23, 27, 33 %, 256 to 1024 +9 to 20 %; D 192, 4096
// +20 and causal +17 %. Their shared memory has no room for what dropout and extra terms need.
constexpr bool pairs_ctas(int head_dim, bool dropout, bool extras) { return head_dim > 128 && !dropout && !extras; }

// The backward's key tiles take turns at dQ and the last writes dq (backward_grid.h) up to so many keys. It saves the
// zeroing and the conversion of an accumulator, whose share falls with the length, and costs idle SMs and waiting: D
// 64, S 128 +63 %, 256 +35 %, 512 +5 %, 1024 -5 %.
constexpr int kFinishedKeys = 512;

// Up to so many keys, of two tiles at least, without extra terms, a cluster's CTAs hand the sums of dQ on instead, and
// no float32 of dQ sees global memory. All calls with their row sums, S 256 / 384 / 512: D 64 +25, 4, 3 %, dropout +6,
// -3, -4 %; D 128 +20, 10, 7 %. At S 1024 they lose 6 %; that the network between the SMs, through which a step moves
// 32 KB, is what binds then is a guess. Ragged sequences leave CTAs of a cluster idle: 256 +2 to +5, 384 and 512 -4 to
// -7 %. D 128 with dropout gains 16, 6 and 1 % but spills. group: heads of q for one of k; with 4 and 8 S 256 gains 13
// to 24 %, but 512 loses 6 and 19 % at D 128, -1 and 7 at D 64.
constexpr int kMaxCluster = 4;
constexpr int relayed_keys(int head_dim, bool dropout, bool ragged, int group) {
  if (head_dim > 128 || (head_dim > 64 && dropout)) return 0;
  return ragged || dropout || group >= 4 ? 256 : 128 * kMaxCluster;
}

// Otherwise the first key tile to come to a query tile stores its dQ instead of adding to zeros, up to so many keys; it
// costs a counter asked for each addition. Beyond, zeros are written ahead of the additions (zero_sums()). On an H200:
// causal S 512 storing is 1 to 4 % faster (256 by 6, two cards' runs held together); S 1024 zeros by 1 to 4 %, causal 0
// to 3, D 128 2048 by 2 and 4; D 64 from 2048 on and what is longer the same within the noise.
constexpr int kStoredKeys = 512;
static_assert(kStoredKeys >= kFinishedKeys);  // who finishes dq has no zeros

// Q, dO and dQ's float32 sums that stay in the L2 cache beside what passes through it (backward_grid.h). D 128, S 1024
// with 4 and 8 heads of q for one of k: 20 MB instead of 32 +1 to +3 %, 12 and 6 -4 to +1 %.
constexpr int64_t kCachedBytes = 20 << 20;

// From so many queries on CTAs share the last pieces of work (attention/divided_work.h): S 2048 0 to 2 %, 4096 to 16384
// +1 to +3 %; 1024 and 1536 -1 to 0 %, for which handing the sums over takes too long.
constexpr int kDividedFromQueries = 2048;

// Up to D 128: two consumer warpgroups own 64 keys each; their dK and dV stay in registers.
struct BackwardConfig {
  int queries;  // a tile: 128, or 64 where registers or shared memory are short; kTallQueries apart
};

constexpr BackwardConfig backward_config(int head_dim, Terms terms) {
#ifdef HF_FLASH_SM90_BACKWARD_CONFIG  // for sweeps
  return HF_FLASH_SM90_BACKWARD_CONFIG;
#endif
  // Dropout gains 15 to 20 % by 128. ALiBi, S 512 / 2048 / 8192 +21, 23, 31 %, causal +6, 21, 26, with dropout 14 to
  // 17; a bias +23, 21, 20 %, causal +5, 15, 16, with dropout 17 to 19, in all of which dQ goes where dS was, or the
  // bias's third tile would not fit: with two tiles it lost 4 to 8 % from S 1024 on. With every term the softcap gains
  // 9 to 27 % too, but what is read element by element loses half.
  return {head_dim <= 64 && terms != Terms::kEvery ? 128 : 64};
}

// Head dimension 128, neither dropout nor extras: query tiles of 80 read less shared memory for a product than those of
// 64, and what a step waits for counts once for more queries. S 1024 +4 %, 2048 +6, 4096 +7, 8192 and 16384 +9, under a
// causal mask +1, 3, 2, 6 and 7. Not measured below: few queries fill the last tile badly, and up to kFinishedKeys keys
// the other kernel writes dq.
constexpr int kTallQueries = 80;
constexpr int kTallFromQueries = 512;
constexpr int kTallAboveKeys = 512;
// Where all key tiles take turns the other kernel writes dq up to so many keys: S 640 -4 % with tall tiles, 1024 +2,
// 2048 +4, 4096 +5, 8192 +7, 16384 +9.
constexpr int kTallTurnsAboveKeys = 768;

// The forward's registers a thread, of the producer and of the consumers: setmaxnreg's share of 65536.
constexpr int producer_registers(int warpgroups) { return warpgroups == 2 ? 24 : 32; }
constexpr int consumer_registers(int warpgroups) { return warpgroups == 2 ? 240 : 160; }

}  // namespace hf_flash::sm90
