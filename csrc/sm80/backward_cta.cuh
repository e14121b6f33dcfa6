// What one CTA of the mma.sync backward does: a tile of keys, and the steps of the algorithm (backward.cuh) on it.
#pragma once

#include "attention/score_gradient.cuh"
#include "portable/portable.h"
#include "sm80/backward_layout.cuh"
#include "sm80/bias_tile.cuh"
#include "tile/copy.cuh"
#include "tile/matmul.cuh"

namespace hf_flash::sm80 {

template <class Traits>
struct BackwardCta {
  using T = typename Traits::T;
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  using ScoreTile = typename Traits::ScoreTile;
  static constexpr int kWarpKeys = Traits::kWarpKeys, kBlock = Traits::kBlock, kQueries = Traits::kQueries;
  static constexpr int kColumnBlocks = Traits::kWarpColumns / 16;

  const AttentionParams& p;
  const DqAccumulator& accumulator;
  const Sequence& sequence;  // in shared memory: the loop's registers are full
  const int b, kv_head, j0;
  const uint32_t shared;
  float* const row_values;  // [stage][lse, row_sum][query]
  int4* const visible;      // for each warp's keys: queries [x, y) see some of them, [z, w) all
  const int warp_key, warp_half, dq_row, dq_column;

  // Tiles of head_dim columns differ by whole tiles: one reader serves K, V, Q and dO.
  const BlockReader<QueryTile, Order::kAcross> rows;       // Q or dO, this warp's queries
  const BlockReader<QueryTile, Order::kDown> columns;      // Q or dO, this warp's columns of dK and dV
  const BlockReader<KeyTile, Order::kDown> keys;           // K or V, from any row
  const BlockReader<KeyTile, Order::kDown> dq_keys;        // K, this warp's columns of dQ
  const BlockReader<ScoreTile, Order::kDown> made_scores;  // dS or P as this warp makes them
  const BlockReader<ScoreTile, Order::kDown> key_scores;   // dS or P of all queries
  const BlockReader<ScoreTile, Order::kAcross> dq_scores;  // dS, this warp's queries of dQ

  Accumulator<kWarpKeys, Traits::kWarpColumns> dk, dv;

  __device__ BackwardCta(const AttentionParams& p, const DqAccumulator& accumulator, const Sequence& sequence,
                         const TileSchedule::Work& work, char* shared_memory)
      : p(p),
        accumulator(accumulator),
        sequence(sequence),
        b(work.batch),
        kv_head(work.head),
        j0(work.tile * Traits::kKeys),
        shared(shared_address(shared_memory)),
        row_values(reinterpret_cast<float*>(shared_memory + Traits::kRowValues)),
        visible(reinterpret_cast<int4*>(shared_memory + Traits::kVisible)),
        warp_key(warp() / Traits::kSplit * kWarpKeys),
        warp_half(warp() % Traits::kSplit),
        dq_row(warp() % Traits::kConfig.dq_warp_rows * Traits::kDqRows),
        dq_column(warp() / Traits::kConfig.dq_warp_rows * Traits::kDqColumns),
        rows(shared, warp_half * Traits::kWarpQueries),
        columns(shared, 0, warp_half * Traits::kWarpColumns / 16),
        keys(shared),
        dq_keys(shared, 0, dq_column / 16),
        made_scores(shared, 0, warp_half * Traits::kWarpQueries / 16),
        key_scores(shared),
        dq_scores(shared, 0, dq_row / 16) {
    dk.clear();
    dv.clear();
    const KeyRange some = queries_seeing(p, sequence, j0 + warp_key, j0 + warp_key + kWarpKeys);
    const uint32_t seen = seen_keys(p, sequence, j0 + warp_key, kWarpKeys);
    KeyRange all{0, 0};
    if (__popc(seen) == kWarpKeys) all = queries_seeing_all(p, sequence, j0 + warp_key, j0 + warp_key + kWarpKeys);
    if (threadIdx.x % 32 == 0) {
      visible[threadIdx.x / 32] = {some.begin, some.end, all.begin, all.end};
      keys_seen()[threadIdx.x / 32] = seen;
    }
  }
  __device__ static int warp() { return uniform(threadIdx.x / 32); }
  // seen_keys() of each warp's.
  __device__ uint32_t* keys_seen() const {
    return reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(visible) + Traits::kSeenKeys - Traits::kVisible);
  }

  // Where the tiles of a stage lie, counted from the readers' first ones. The same for all threads: it stays in uniform
  // registers, which the addresses of ldmatrix take for free.
  __device__ static uint32_t q_place(int stage) { return Traits::kStages + stage * Traits::kStageBytes; }
  __device__ static uint32_t dout_place(int stage) { return q_place(stage) + QueryTile::kBytes; }
  __device__ static uint32_t ds_place(int stage) {
    return Traits::kScores + (Traits::kLate ? stage * Traits::kScoreBytes : 0);
  }
  __device__ static uint32_t p_place(int stage) { return ds_place(stage) + ScoreTile::kBytes; }

  __device__ T* head_of(const Rows& x, int64_t first_row, int head) const {
    return static_cast<T*>(x.data) + b * x.batch + first_row * x.row + head * x.head;
  }

  __device__ void load_keys() const {
    const int head = kv_head / p.key_head_parts;
    const TileCopy<KeyTile, Traits::kThreads> k(head_of(p.k, sequence.first_k, head), p.k.row, p.head_dim);
    k.start_load(shared, j0, sequence.key_begin, sequence.key_end);
    const TileCopy<KeyTile, Traits::kThreads> v(head_of(p.v, sequence.first_k, head), p.v.row, p.head_dim_v);
    v.start_load(shared + Traits::kV, j0, sequence.key_begin, sequence.key_end);
  }

  // The bias of a step's scores that this warp computes. A 16 x 16 block of it lies, queries by keys, where the same
  // block of dS will, keys by queries: a warp has read it before it stores dS there.
  __device__ static uint32_t bias_place(int stage) { return Traits::kLate ? ds_place(stage) : Traits::kBias; }
  __device__ __forceinline__ void load_bias(const BackwardStep& step, int stage) const {
    if (!Traits::kExtras || !copies_bias<Traits::kEveryTerm>(p)) return;
    const uint32_t tile = shared + bias_place(stage);
    const int query = warp_half * Traits::kWarpQueries;
    const auto place = [&](int row, int chunk) {
      return tile + ScoreTile::offset(warp_key + 16 * (chunk / 2) + row % 16, 2 * ((query + row) / 16) + chunk % 2);
    };
    start_bias_copy<Traits::kWarpQueries, kWarpKeys>(p, b, step.head, step.i0 + query, sequence.len_q, j0 + warp_key,
                                                     sequence.len_k, place);
  }
  __device__ __forceinline__ bool add_bias(Accumulator<kWarpKeys, kBlock>& s, int stage, int block) const {
    if (!copies_bias<Traits::kEveryTerm>(p)) return false;
#pragma unroll
    for (int m = 0; m < kWarpKeys / 16; ++m) {
#pragma unroll
      for (int k = 0; k < kBlock / 16; ++k) {
        uint32_t x[4];
        ldmatrix_x4_transposed(x, score_address(m, k, block, bias_place(stage)));
        add_bias_block<T>(s, m, k, {x[0], x[2], x[1], x[3]});
      }
    }
    __syncwarp();
    return true;
  }

  __device__ __forceinline__ void load_queries(const BackwardStep& step, int stage) const {
    const TileCopy<QueryTile, Traits::kThreads> q(head_of(p.q, sequence.first_q, step.head), p.q.row, p.head_dim);
    q.start_load(shared + q_place(stage), step.i0, sequence.query_begin, sequence.query_end);
    const TileCopy<QueryTile, Traits::kThreads> dout(head_of(p.dout, sequence.first_q, step.head), p.dout.row,
                                                     p.head_dim_v);
    dout.start_load(shared + dout_place(stage), step.i0, sequence.query_begin, sequence.query_end);
    copy_async_commit();
  }

  // Kept along the loop, with extra terms, something else would be spilled.
  __device__ static int thread_of_values() { return Traits::kExtras ? opaque(threadIdx.x) : threadIdx.x; }
  // lse or row_sum of one query, a value a thread: fetched early, stored when the step's work is done.
  __device__ __forceinline__ float fetch_row_value(const BackwardStep& step) const {
    const int thread = thread_of_values();
    const int i = step.i0 + thread % kQueries;
    const bool is_lse = thread < kQueries;
    if (thread >= 2 * kQueries || !sequence.computes(i)) return is_lse ? CUDART_INF_F : 0.0f;
    const RowValues& from = is_lse ? p.lse : p.row_sum;
    const float x = static_cast<const float*>(from.data)[b * from.batch + step.head * from.head + sequence.first_q + i];
    if (is_lse) return lse_for_gradient(x);
    return Traits::kDropout ? x * (p.dropout_keep / 256.0f) : x;
  }
  __device__ __forceinline__ void store_row_value(float x, int stage) const {
    const int thread = thread_of_values();
    if (thread < 2 * kQueries) row_values[stage * 2 * kQueries + thread] = x;
  }

  // c = A B^T over the head dimension: A this warp's keys in K or V, B a block of queries in Q or dO.
  __device__ __forceinline__ void products(Accumulator<kWarpKeys, kBlock>& c, uint32_t key_tile, uint32_t query_tile,
                                           int block) const {
    c.clear();
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      OperandA<kWarpKeys, 16> a;
      load_operand(a, 0, keys, k, key_tile + warp_key * KeyTile::kRowBytes);
      multiply_by_transpose<T, kBlock / 16>(c, 0, a, 0, rows, 0, k, query_tile + block * kBlock * QueryTile::kRowBytes);
    }
  }

  // P and dS of one block of queries; where they stay with this warp, dV and dK too.
  __device__ __forceinline__ void scores(const BackwardStep& step, int stage, int block) {
    const int query = warp_half * Traits::kWarpQueries + block * kBlock;  // first one, within the tile
    const int i0 = step.i0 + query, key0 = j0 + warp_key;
    const int4 seen = visible[warp()];
    if (i0 >= seen.y || i0 + kBlock <= seen.x) return skip_scores(stage, block);
    const bool boundary = i0 < seen.z || i0 + kBlock > seen.w;
    Accumulator<kWarpKeys, kBlock> s, dp;
    products(s, 0, q_place(stage), block);
    products(dp, Traits::kV, dout_place(stage), block);

    const float* lse = row_values + stage * 2 * kQueries + query;
    const ScoreGradient<T, Traits::kDropout, Traits::kExtras, Traits::kExtras, Traits::kEveryTerm> gradient(
        p, sequence, b, step.head);
    gradient.apply(s, dp, lse, lse + kQueries, i0, key0, boundary, keys_seen() + warp(),
                   [&](auto& scores) { return add_bias(scores, stage, block); });

    OperandA<kWarpKeys, kBlock> probabilities, ds;
    to_operand<T>(probabilities, s, 0);
    to_operand<T>(ds, dp, 0);
    store_scores(ds, block, ds_place(stage));
    const uint32_t skipped = block * kBlock * QueryTile::kRowBytes;
    if constexpr (Traits::kSplit == 2) {
      store_scores(probabilities, block, p_place(stage));
    } else {
#pragma unroll
      for (int k = 0; k < kBlock / 16; ++k) {
        multiply<T, kColumnBlocks>(dv, 0, probabilities, k, columns, k, 0, dout_place(stage) + skipped);
      }
#pragma unroll
      for (int k = 0; k < kBlock / 16; ++k) {
        multiply<T, kColumnBlocks>(dk, 0, ds, k, columns, k, 0, q_place(stage) + skipped);
      }
    }
  }

  // None of this warp's keys is seen.
  __device__ __forceinline__ void skip_scores(int stage, int block) const {
    OperandA<kWarpKeys, kBlock> zero = {};
    store_scores(zero, block, ds_place(stage));
    if constexpr (Traits::kSplit == 2) store_scores(zero, block, p_place(stage));
  }

  // A row of at most 128 bytes: the block's place enters the permutation as an exclusive or.
  __device__ __forceinline__ uint32_t score_address(int m, int k, int block, uint32_t place) const {
    return made_scores.address(m, k, place + warp_key * ScoreTile::kRowBytes) ^ (2 * kBlock * block);
  }
  __device__ __forceinline__ void store_scores(const OperandA<kWarpKeys, kBlock>& x, int block, uint32_t place) const {
#pragma unroll
    for (int m = 0; m < kWarpKeys / 16; ++m) {
#pragma unroll
      for (int k = 0; k < kBlock / 16; ++k) stmatrix_x4(score_address(m, k, block, place), x.x[m][k]);
    }
  }

  // dV and dK from P and dS that two warps made.
  __device__ __forceinline__ void shared_gradients(int stage) {
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k) {
      OperandA<kWarpKeys, 16> a;
      load_operand(a, 0, key_scores, k, p_place(stage) + warp_key * ScoreTile::kRowBytes);
      multiply<T, kColumnBlocks>(dv, 0, a, 0, columns, k, 0, dout_place(stage));
      load_operand(a, 0, key_scores, k, ds_place(stage) + warp_key * ScoreTile::kRowBytes);
      multiply<T, kColumnBlocks>(dk, 0, a, 0, columns, k, 0, q_place(stage));
    }
  }

  // Adds dS K of the step to the accumulator. In deterministic mode the key tiles of a query tile take turns.
  __device__ __forceinline__ void add_dq(const BackwardStep& step, int stage) const {
    Accumulator<Traits::kDqRows, Traits::kDqColumns> dq;
    dq.clear();
#pragma unroll
    for (int k = 0; k < Traits::kKeys / 16; ++k) {
      OperandA<Traits::kDqRows, 16> ds;
      load_operand_transposed(ds, 0, dq_scores, k, 0, ds_place(stage));
      multiply<T, Traits::kDqColumns / 16>(dq, 0, ds, 0, dq_keys, k, 0);
    }
    if (accumulator.ordered) wait_for_turn(step);
    const int lane = opaque(threadIdx.x % 32);
#pragma unroll
    for (int m = 0; m < Traits::kDqRows / 16; ++m) {
      float* to = accumulator.rows(sequence, b, step.head, step.i0 + dq_row + 16 * m);
#pragma unroll
      for (int n = 0; n < Traits::kDqColumns / 8; ++n) add_fragment(to, dq_column / 8 + n, lane, dq.x[m][n]);
    }
    if (accumulator.ordered) end_turn(step);
  }

  __device__ __forceinline__ static void add_fragment(float* rows, int block, int lane, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
    add_global_4(rows + DqAccumulator::element(block, lane, 0), x);
#else
#pragma unroll
    for (int e = 0; e < 4; ++e) add_global(rows + DqAccumulator::element(block, lane, e), x[e]);
#endif
  }

  // Key tiles that see these queries have consecutive numbers: the first one's is that of their first visible key.
  __device__ __forceinline__ void wait_for_turn(const BackwardStep& step) const {
    if (threadIdx.x == 0) {
      const int row_begin = max(step.i0, sequence.query_begin), row_end = min(step.i0 + kQueries, sequence.query_end);
      const int turn =
          (j0 - sequence.keys_of(p, row_begin, row_end).begin / Traits::kKeys * Traits::kKeys) / Traits::kKeys;
      const int32_t* counter = accumulator.counter(sequence, b, step.head, step.i0);
      while (load_acquire(counter) < turn) __nanosleep(20);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void end_turn(const BackwardStep& step) const {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) add_release(accumulator.counter(sequence, b, step.head, step.i0), 1);
  }

  // dK and dV, rounded, through the shared memory of K and V.
  __device__ __forceinline__ void store_gradients() {
    const float dropout_factor = Traits::kDropout ? 256.0f / p.dropout_keep : 1.0f;
    const float dk_factor = static_cast<float>(p.scale) * dropout_factor;
    dk.for_each([&](float& x, int, int) { x *= dk_factor; });
    if (Traits::kDropout) dv.for_each([&](float& x, int, int) { x *= dropout_factor; });
    const int first_column = warp_half * Traits::kWarpColumns;
    const int warp_key = opaque(threadIdx.x) / 32 / Traits::kSplit * kWarpKeys;
    __syncthreads();
    store_to_tile<T, KeyTile>(shared, warp_key, dk, first_column);
    store_to_tile<T, KeyTile>(shared + Traits::kV, warp_key, dv, first_column);
    __syncthreads();
    constexpr int kRows = Traits::kKeys / Traits::kConfig.warps;
    const int rows_left = sequence.len_k - j0;
    store_rows<kRows, KeyTile>(head_of(p.dk, sequence.first_k + j0, kv_head), p.dk.row, p.head_dim, shared,
                               warp() * kRows, rows_left);
    store_rows<kRows, KeyTile>(head_of(p.dv, sequence.first_k + j0, kv_head), p.dv.row, p.head_dim_v,
                               shared + Traits::kV, warp() * kRows, rows_left);
  }
};

}  // namespace hf_flash::sm80
