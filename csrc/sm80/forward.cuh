// Forward for GPUs since Ampere: FlashAttention (Dao et al. 2022, 2023) with mma.sync and cp.async. One CTA computes a
// tile of query rows of one head against all keys they see. While the exponentials of key tile j are taken, the tensor
// cores already multiply Q by the keys of tile j + 1, block by block, in the registers that tile j leaves.
#pragma once

#include <cuda_runtime.h>

#include "attention/dropout_fragment.cuh"
#include "attention/schedule.cuh"
#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "attention/tile_range.cuh"
#include "instructions/unroll.cuh"
#include "portable/cuda_call.h"
#include "sm80/bias_tile.cuh"
#include "sm80/config.h"
#include "sm80/instances.h"
#include "tile/copy.cuh"
#include "tile/matmul.cuh"

namespace hf_flash::sm80 {

template <class ELEMENT, int HEAD_DIM, bool DROPOUT, Terms TERMS>
struct ForwardTraits {
  using T = ELEMENT;
  static constexpr ForwardConfig kConfig = forward_config(HEAD_DIM, DROPOUT, TERMS);
  static constexpr int kHeadDim = HEAD_DIM;  // bucket: D and Dv are at most this
  static constexpr bool kDropout = DROPOUT;
  static constexpr bool kExtras = TERMS != Terms::kNone, kEveryTerm = TERMS == Terms::kEvery;
  static constexpr int kWarpRows = kConfig.warp_rows;
  static constexpr int kRows = kConfig.warp_rows * kConfig.warps;
  static constexpr int kWarps = kConfig.warps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = kConfig.keys;
  static constexpr int kBlock = kConfig.block;
  static constexpr int kDepth = HEAD_DIM / 16;  // mma steps of QK^T
  static constexpr bool kQueriesInRegisters = kConfig.queries_in_registers;
  using QTile = SharedTile<kRows, HEAD_DIM>;
  using KVTile = SharedTile<kKeys, HEAD_DIM>;
  static constexpr int kKeyPlaces = QTile::kBytes, kAllTiles = kKeyPlaces + 4 * KVTile::kBytes;  // K and V twice
  // A warp's part of the bias lies where its part of Q was, once that is in registers. Otherwise it takes memory, at
  // D 96 and 256 so much that sm_86 and sm_89 would run a block less.
  using BiasTile = SharedTile<kWarpRows, kKeys>;
  static constexpr bool kCopiesBias = kExtras && (kQueriesInRegisters || HEAD_DIM == 128 || HEAD_DIM == 192);
  static constexpr int kBias = kQueriesInRegisters ? 0 : kAllTiles;
  static constexpr int kBiasStep = kQueriesInRegisters ? kWarpRows * QTile::kRowBytes : BiasTile::kBytes;
  static_assert(!kCopiesBias || BiasTile::kBytes <= kBiasStep);
  static constexpr int kTileBytes = kAllTiles + (kCopiesBias && !kQueriesInRegisters ? kWarps * kBiasStep : 0);
};

// Address of a sequence's first row at one head; elements of 16 bits.
__device__ inline char* head_of(const Rows& x, int b, int64_t first_row, int head) {
  return static_cast<char*>(x.data) + 2 * (b * x.batch + first_row * x.row + head * x.head);
}

// What a CTA works out once. It lies in shared memory, to be read where it is needed: the registers belong to the
// fragments.
template <class Traits>
struct ForwardPlan {
  Sequence sequence;
  TileRange own[Traits::kWarps];  // of each warp
  TileRange tiles;                // of the CTA
  const void *k, *v;              // the sequence's first row at this head
  int key_limit;                  // keys from here on are nobody's in this CTA

  // Threads 0 .. kWarps each work out a part.
  __device__ void make(const AttentionParams& p, const Sequence& s, int b, int h, int row0) {
    const int thread = threadIdx.x;
    if (thread > Traits::kWarps) return;
    const bool all = thread == Traits::kWarps;
    const int begin = row0 + (all ? 0 : thread * Traits::kWarpRows);
    const TileRange range(p, s, begin, begin + (all ? Traits::kRows : Traits::kWarpRows), Traits::kKeys);
    if (all) {
      const int kv_head = h / (p.heads_q / p.heads_k);
      sequence = s;
      tiles = range;
      key_limit = min(s.key_end, range.end * Traits::kKeys);
      k = head_of(p.k, b, s.first_k, kv_head);
      v = head_of(p.v, b, s.first_k, kv_head);
    } else {
      own[thread] = range;
    }
  }
  // By all threads, which all see the plan.
  __device__ void find_holes(const AttentionParams& p) {
    const bool hides = hides_some(sequence.key_mask(p), sequence.len_k, sequence.key_begin, sequence.key_end,
                                  threadIdx.x, Traits::kThreads);
    if (__syncthreads_or(hides) && threadIdx.x < Traits::kWarps) own[threadIdx.x].hide_in_all();
    __syncthreads();
  }
};

// What one warp holds in registers, and the steps of the algorithm on it.
template <class Traits>
struct ForwardWarp {
  using T = typename Traits::T;
  using QTile = typename Traits::QTile;
  using KVTile = typename Traits::KVTile;
  static constexpr int kWarpRows = Traits::kWarpRows;
  static constexpr int kHeldDepth = Traits::kQueriesInRegisters ? Traits::kHeadDim : 16;

  using KeyReader = BlockReader<KVTile, Order::kAcross>;
  using ValueReader = BlockReader<KVTile, Order::kDown>;
  using QueryReader = BlockReader<QTile, Order::kDown>;
  QueryReader q_tile;  // unless the queries stay in registers
  KeyReader k_tile;    // K of the next tile
  ValueReader v_tile;  // V of the current one
  OperandA<kWarpRows, kHeldDepth> q;
  Accumulator<kWarpRows, Traits::kKeys> s;  // scores of the current tile, block by block those of the next
  Accumulator<kWarpRows, Traits::kHeadDim> out;
  RowVector<kWarpRows> top;  // this lane's part of the maxima of s
  OnlineSoftmax<kWarpRows> softmax;

  __device__ ForwardWarp(uint32_t q_address, uint32_t k_address, uint32_t v_address, int warp)
      : q_tile(q_address, warp * kWarpRows), k_tile(k_address), v_tile(v_address) {
    out.clear();
  }

  __device__ __forceinline__ void load_queries(uint32_t q_address, int warp) {
    if constexpr (Traits::kQueriesInRegisters) {
      const QueryReader once(opaque(q_address), warp * kWarpRows);
#pragma unroll
      for (int k = 0; k < Traits::kDepth; ++k) load_operand(q, k, once, k);
    }
  }

  // Block b of s = Q K^T, depth step k.
  __device__ __forceinline__ void score_step(int b, int k) {
    if constexpr (!Traits::kQueriesInRegisters) load_operand(q, 0, q_tile, k);
    multiply_by_transpose<T, Traits::kBlock / 16>(s, b * Traits::kBlock / 16, q, Traits::kQueriesInRegisters ? k : 0,
                                                  k_tile, b * Traits::kBlock / 16, k);
  }

  __device__ __forceinline__ void clear_scores(int b) {
#pragma unroll
    for (int m = 0; m < kWarpRows / 16; ++m) {
#pragma unroll
      for (int n = b * Traits::kBlock / 8; n < (b + 1) * Traits::kBlock / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s.x[m][n][e] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void take_max(int b) { take_lane_max(top, s, b * Traits::kBlock / 8, Traits::kBlock / 8); }
  __device__ __forceinline__ void take_max() { take_lane_max(top, s, 0, Traits::kKeys / 8); }

  // s = Q K^T, all of the tile.
  __device__ __forceinline__ void scores() {
    unrolled<Traits::kKeys / Traits::kBlock>([&](int b) {
      clear_scores(b);
#pragma unroll
      for (int k = 0; k < Traits::kDepth; ++k) score_step(b, k);
    });
    take_max();
  }

  // out += softmax(s) V, and where NEXT, s = Q K^T of the next tile. i_block, j_block: the warp's first query and the
  // tile's first key in blocks of 16.
  // start_copies() runs among the matrix products, which hide its latency.
  template <bool NEXT, class StartCopies>
  __device__ __forceinline__ void attend(const StartCopies& start_copies, float factor,
                                         const FragmentDropout<false>& dropout, int i_block, int j_block) {
    constexpr bool kEarly = !Traits::kDropout || Traits::kEveryTerm;  // with dropout alone ptxas spills then
    unrolled<Traits::kKeys / Traits::kBlock, kEarly>([&](int b) {
      OperandA<kWarpRows, Traits::kBlock> probabilities;
      softmax.exponentiate(s, factor, b * Traits::kBlock / 8, Traits::kBlock / 8);
      to_operand<T>(probabilities, s, b * Traits::kBlock / 16);
      // With every term one variant serves calls with and without dropout.
      if (Traits::kDropout && (!Traits::kEveryTerm || dropout.keep < 256)) {
        drop(probabilities, dropout, i_block, j_block + b * Traits::kBlock / 16);
      }
      if constexpr (NEXT) {
        clear_scores(b);
#pragma unroll
        for (int k = 0; k < Traits::kDepth; ++k) score_step(b, k);
      }
      if (b == 0) start_copies();
#pragma unroll
      for (int k = 0; k < Traits::kBlock / 16; ++k) {
        multiply<T, Traits::kHeadDim / 16>(out, 0, probabilities, k, v_tile, b * Traits::kBlock / 16 + k, 0);
      }
      if constexpr (NEXT) take_max(b);
    });
  }

  // Zeroes what dropout drops. Two 16 x 16 blocks a draw: one above the other where the warp has 32 rows, else side by
  // side.
  __device__ static __forceinline__ void drop(OperandA<kWarpRows, Traits::kBlock>& probabilities,
                                              const FragmentDropout<false>& dropout, int i_block, int j_block) {
    constexpr int kM = kWarpRows / 16, kPairs = kM * Traits::kBlock / 32;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int m1 = kM == 2 ? 1 : 0, k0 = kM == 2 ? pair : 2 * pair, k1 = kM == 2 ? pair : 2 * pair + 1;
      const DropoutWords words = dropout.draw(i_block, j_block + k0, i_block + m1, j_block + k1);
      uint32_t mask[4];
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        dropout.masks(mask, words, block);
#pragma unroll
        for (int x = 0; x < 4; ++x) probabilities.x[block * m1][block ? k1 : k0][x] &= mask[x];
      }
    }
  }
};

// The bias of a warp's scores, one tile at a time: read before the copies of the next one start.
template <class Traits>
struct WarpBias {
  using Tile = typename Traits::BiasTile;
  const AttentionParams& p;
  const uint32_t shared;

  // Worked out where it is needed: kept, it would cost a register all along.
  __device__ uint32_t tile() const { return shared + Traits::kBias + opaque(threadIdx.x) / 32 * Traits::kBiasStep; }
  __device__ bool copied() const { return Traits::kCopiesBias && copies_bias<Traits::kEveryTerm>(p); }

  // Of the warp's rows, which begin at i0, and keys from j0 on.
  __device__ __forceinline__ void start_copy(const Sequence& sequence, int b, int h, int i0, int j0) const {
    if (!copied()) return;
    const uint32_t first = tile();
    start_bias_copy<Traits::kWarpRows, Traits::kKeys>(
        p, b, h, i0, sequence.len_q, j0, sequence.len_k,
        [&](int row, int chunk) { return first + Tile::offset(row, chunk); });
  }
  __device__ __forceinline__ void add(Accumulator<Traits::kWarpRows, Traits::kKeys>& s) const {
    if (!copied()) return;
    add_bias_tile<typename Traits::T>(s, BlockReader<Tile, Order::kDown>(tile()));
    __syncwarp();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kConfig.blocks_per_sm)
    forward_kernel(const __grid_constant__ AttentionParams p, const TileSchedule schedule) {
  using T = typename Traits::T;
  using QTile = typename Traits::QTile;
  using KVTile = typename Traits::KVTile;
  constexpr int kRows = Traits::kRows, kKeys = Traits::kKeys, kWarpRows = Traits::kWarpRows;

  const bool reverse = p.window_right >= 0 && p.window_left < 0;
  const TileSchedule::Work work = schedule.work(reverse);
  const int h = work.head, b = work.batch, row0 = work.tile * kRows;

  extern __shared__ __align__(128) char shared_memory[];
  const uint32_t q_tile = shared_address(shared_memory), kv_tiles = q_tile + Traits::kKeyPlaces;
  auto& plan = *reinterpret_cast<ForwardPlan<Traits>*>(shared_memory + Traits::kTileBytes);
  {
    const Sequence sequence(p, b);
    if (row0 >= sequence.len_q) return;
    const TileCopy<QTile, Traits::kThreads> q(head_of(p.q, b, sequence.first_q, h), p.q.row, p.head_dim);
    q.start_load(q_tile, row0, sequence.query_begin, sequence.query_end);
    plan.make(p, sequence, b, h, row0);
  }
  __syncthreads();
  const Sequence& sequence = plan.sequence;
  if (p.key_mask != nullptr) plan.find_holes(p);

  // Tiles of K and V alternate between two places each, given as bytes from kv_tiles.
  const auto k_place = [](int tile) { return static_cast<uint32_t>((tile & 1) * KVTile::kBytes); };
  const auto v_place = [](int tile) { return static_cast<uint32_t>((2 + (tile & 1)) * KVTile::kBytes); };
  const auto load_keys = [&](int tile) {
    TileCopy<KVTile, Traits::kThreads>(plan.k, p.k.row, p.head_dim)
        .start_load(kv_tiles + k_place(tile), tile * kKeys, sequence.key_begin, plan.key_limit);
  };
  const auto load_values = [&](int tile) {
    TileCopy<KVTile, Traits::kThreads>(plan.v, p.v.row, p.head_dim_v)
        .start_load(kv_tiles + v_place(tile), tile * kKeys, sequence.key_begin, plan.key_limit);
  };

  const int warp = threadIdx.x / 32, warp_row0 = row0 + warp * kWarpRows;
  ScoreExtras<T, false, Traits::kEveryTerm> extras(p, b, h);
  if (p.key_mask != nullptr && !plan.own[warp].has_holes()) extras.mask = nullptr;
  const WarpBias<Traits> bias{p, q_tile};
  if (bias.copied()) extras.bias = nullptr;
  const FragmentDropout<false> dropout(p, b * p.heads_q + h);
  // Scores count as s * factor in log2 units; with extras they are brought there first.
  const float factor = Traits::kExtras ? 1.0f : static_cast<float>(p.scale) * kLog2E;

  const int first_tile = plan.tiles.begin;
  ForwardWarp<Traits> state(q_tile, kv_tiles + k_place(first_tile), kv_tiles + v_place(first_tile - 1), warp);
  // Step `tile` turns the scores of this tile into output and computes those of tile + 1; step first - 1 only the
  // latter. Each step finds its V and K in shared memory and starts the copies of the next step's; past the last tile
  // these only write zeros, which costs less than a branch among the matrix products.
  const auto load_bias = [&](int tile) { bias.start_copy(sequence, b, h, warp_row0, tile * kKeys); };
  const auto load_step = [&](int tile) {
    load_values(tile);
    load_keys(tile + 1);
    if (tile > first_tile) load_bias(tile);
    copy_async_commit();
  };
  if (first_tile < plan.tiles.end) {
    load_keys(first_tile);
    copy_async_commit();
    load_step(first_tile);
  } else {  // nothing to see; Q must have landed before its tile is used for the output
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }
  for (int tile = first_tile - 1; tile < plan.tiles.end; ++tile) {
    const TileRange own = plan.own[warp];
    const int j0 = tile * kKeys;
    const auto start_copies = [&] { load_step(tile + 1); };
    if (tile < plan.tiles.begin) {
      copy_async_wait<1>();  // Q and the first K; the copies of the next step are on their way already
      __syncthreads();
      state.load_queries(q_tile, warp);
      if constexpr (Traits::kCopiesBias) {
        __syncwarp();  // all lanes have their queries, where the bias will lie
        load_bias(tile + 1);
        copy_async_commit();
      }
      if (own.has(tile + 1)) state.scores();
    } else {
      copy_async_wait<0>();
      __syncthreads();
      if (own.has(tile)) {
        if constexpr (Traits::kExtras) {
          extras.scale_and_cap(state.s);
          bias.add(state.s);
          extras.add(state.s, sequence, warp_row0, j0);
        }
        const bool boundary = own.hides(j0, j0 + kKeys);
        if (boundary) hide_invisible<false, !Traits::kEveryTerm>(state.s, p, sequence, warp_row0, j0, own.has_holes());
        if (Traits::kExtras || boundary) state.take_max();
        state.softmax.update_max(state.top, state.out, factor);
        if (own.has(tile + 1)) {
          state.template attend<true>(start_copies, factor, dropout, warp_row0 / 16, j0 / 16);
        } else {
          state.template attend<false>(start_copies, factor, dropout, warp_row0 / 16, j0 / 16);
        }
      } else {
        start_copies();
        if (own.has(tile + 1)) state.scores();
      }
    }
    state.k_tile.advance(static_cast<int>(k_place(tile)) - static_cast<int>(k_place(tile + 1)));
    state.v_tile.advance(static_cast<int>(v_place(tile + 1)) - static_cast<int>(v_place(tile)));
  }

  copy_async_wait<0>();

  // out / sum, rounded, through this warp's rows of Q's tile; lse.
  const float sink = p.sink != nullptr ? static_cast<const float*>(p.sink)[h] * kLog2E : -CUDART_INF_F;
  float* lse = static_cast<float*>(p.lse.data) + b * p.lse.batch + h * p.lse.head + sequence.first_q;
#pragma unroll
  for (int i = 0; i < RowVector<kWarpRows>::kCount; ++i) {
    const int row = warp_row0 + RowVector<kWarpRows>::row(i);
    float row_lse;
    float inverse = state.softmax.finish(i, sink, row_lse);
    if (!sequence.computes(row)) inverse = 0.0f, row_lse = -CUDART_INF_F;
    if (Traits::kDropout) inverse *= 256.0f / p.dropout_keep;
    if (lane_col() == 0 && row < sequence.len_q) lse[row] = row_lse;
#pragma unroll
    for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
#pragma unroll
      for (int e = 2 * (i % 2); e < 2 * (i % 2) + 2; ++e) {
        state.out.x[i / 2][n][e] = inverse == 0.0f ? 0.0f : state.out.x[i / 2][n][e] * inverse;
      }
    }
  }
  __syncwarp();  // other lanes read these rows
  store_to_tile<T, QTile>(q_tile, warp * kWarpRows, state.out);
  __syncwarp();
  store_rows<kWarpRows, QTile>(head_of(p.out, b, sequence.first_q + row0, h), p.out.row, p.head_dim_v, q_tile,
                               warp * kWarpRows, sequence.len_q - row0);
}

template <class T, int HEAD_DIM, bool DROPOUT, Terms TERMS>
void run_forward(const AttentionParams& p, cudaStream_t stream) {
  using Traits = ForwardTraits<T, HEAD_DIM, DROPOUT, TERMS>;
  constexpr int kSharedBytes = Traits::kTileBytes + sizeof(ForwardPlan<Traits>);
  const auto kernel = forward_kernel<Traits>;
  static SharedMemoryPermit permit;
  permit.ask(kernel, kSharedBytes);
  TileSchedule schedule{(p.seqlen_q + Traits::kRows - 1) / Traits::kRows, p.heads_q, p.batch};
  if (schedule.tiles == 0) return;
  for (; schedule.first_batch < p.batch; schedule.first_batch += TileSchedule::kMaxBatch) {
    kernel<<<schedule.grid(), Traits::kThreads, kSharedBytes, stream>>>(p, schedule);
    check_launch("forward");
  }
}

}  // namespace hf_flash::sm80
