// The gradient of a bias that broadcasts over batch or heads, for Hopper: dS summed over them. As in the mma.sync
// kernel a CTA owns a tile of the bias's own gradient, computes S = Q K^T and dP = dO V^T of all the score tiles that
// it was added to, adds dS up in registers and writes the sum once. It stays on its SM and takes one such tile after
// the other. Its bias comes to shared memory once; two warpgroups of 64 queries by 128 keys take turns at the tensor
// cores, and copies never stop.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "attention/dropout_fragment.cuh"
#include "attention/score_gradient.cuh"
#include "instructions/warpgroup.cuh"
#include "portable/cuda_call.h"
#include "sm90/bias_gradient_layout.cuh"
#include "sm90/instances.h"
#include "tile/store.cuh"

namespace hf_flash::sm90 {

// One thread works out the steps, as far ahead as their ring allows.
__device__ __forceinline__ void make_steps(const AttentionParams& p, const BiasTiles& tiles, const BiasShared& shared) {
  if (threadIdx.x % 32 != 0) return;
  uint32_t n = 0;
  const auto publish = [&](BiasStep& step, BiasStep::Kind kind) {
    step.kind = kind;
    mbarrier_arrive(shared.steps.full(n++));
  };
  const int count = static_cast<int>(tiles.count());
  for (int tile = blockIdx.x; tile < count; tile += gridDim.x) {
    const int plane = tile / tiles.tiles;
    const BiasWalk walk(p, tiles.key_tiles, tile % tiles.tiles, plane % tiles.heads, plane / tiles.heads);
    shared.steps.wait_empty(n);
    walk.find_first(p, shared.step(n));
    while (shared.step(n).exists) {
      BiasStep& step = shared.step(n);
      publish(step, BiasStep::kTask);
      shared.steps.wait_empty(n);
      walk.find_next(p, step, shared.step(n));
    }
    BiasStep& step = shared.step(n);
    step.batch = walk.batch_begin;
    step.head = walk.head_begin;
    step.i0 = walk.i_begin;
    step.j0 = walk.j_begin;
    publish(step, BiasStep::kWrite);
  }
  shared.steps.wait_empty(n);
  publish(shared.step(n), BiasStep::kEnd);
}

// A warp brings the bias of each tile of the gradient before its first task, and each task's chunks.
__device__ __forceinline__ void copy_tiles(const AttentionParams& p, const BiasMaps& maps, const BiasShared& shared) {
  using Config = BiasConfig;
  using Tile = Config::Tile;
  const bool leader = elect_one();
  uint32_t chunk = 0, tile = 0;
  bool has_bias = false;
  for (uint32_t n = 0;; ++n) {
    shared.steps.wait_full(n);
    const BiasStep& step = shared.step(n);
    const BiasStep::Kind kind = step.kind;
    if (kind == BiasStep::kEnd) return;
    if (kind == BiasStep::kTask) {
      if (!has_bias) {
        shared.biases.wait_empty(tile);
        if (leader) {
          mbarrier_arrive_expect_bytes(shared.biases.full(tile), Config::ScoreTile::kBytes);
          load_tile<Config::ScoreTile>(shared.bias(tile), maps.bias, shared.biases.full(tile), step.i0,
                                       coordinate_of(p.bias.head, step.head), coordinate_of(p.bias.batch, step.batch),
                                       step.j0);
        }
        has_bias = true;
      }
      const int kv_head = step.head / (p.heads_q / p.heads_k);
      const auto load = [&](const CUtensorMap& query_map, const Rows& queries, const CUtensorMap& key_map,
                            const Rows& keys, int head_dim) {
        for (int column = 0; column < head_dim; column += Config::kColumns, ++chunk) {
          shared.chunks.wait_empty(chunk);
          __syncwarp();  // a lane that came late could find this phase over twice
          if (leader) {
            const uint32_t full = shared.chunks.full(chunk);
            mbarrier_arrive_expect_bytes(full, Config::kPlaceBytes);
            load_tile<Tile>(shared.queries(chunk), query_map, full, step.sequence.first_q + step.i0,
                            coordinate_of(queries.head, step.head), coordinate_of(queries.batch, step.batch), column);
            load_tile<Tile>(shared.keys(chunk), key_map, full, step.sequence.first_k + step.j0,
                            coordinate_of(keys.head, kv_head), coordinate_of(keys.batch, step.batch), column);
          }
        }
      };
      load(maps.q, p.q, maps.k, p.k, p.head_dim);
      load(maps.dout, p.dout, maps.v, p.v, p.head_dim_v);
    } else {
      tile += has_bias;
      has_bias = false;
    }
    __syncwarp();
    shared.steps.release(n);
  }
}

// A warp brings lse, in log2 units, and row sums of each task's queries; rows that are not computed get probabilities
// of 0.
__device__ __forceinline__ void copy_row_values(const AttentionParams& p, const BiasShared& shared) {
  constexpr int kRows = BiasConfig::kQueries / 32;
  const float factor = p.dropout_keep / 256.0f;
  const int lane = threadIdx.x % 32;
  uint32_t task = 0;
  for (uint32_t n = 0;; ++n) {
    shared.steps.wait_full(n);
    const BiasStep& step = shared.step(n);
    const BiasStep::Kind kind = step.kind;
    if (kind == BiasStep::kEnd) return;
    if (kind == BiasStep::kTask) {
      // All loads are under way before the first is needed: their latency counts once.
      const int64_t row0 = step.sequence.first_q + step.i0 + lane;
      const float* lse = static_cast<const float*>(p.lse.data) + step.batch * p.lse.batch + step.head * p.lse.head;
      const float* row_sum =
          static_cast<const float*>(p.row_sum.data) + step.batch * p.row_sum.batch + step.head * p.row_sum.head;
      float row_lse[kRows], row_sums[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool computed = step.sequence.computes(step.i0 + lane + 32 * r);
        row_lse[r] = computed ? lse[row0 + 32 * r] : -CUDART_INF_F;
        row_sums[r] = computed ? row_sum[row0 + 32 * r] : 0.0f;
      }
      shared.values.wait_empty(task);
      float* to = shared.row_values(task) + lane;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        to[32 * r] = lse_for_gradient(row_lse[r]);
        to[BiasConfig::kQueries + 32 * r] = row_sums[r] * factor;
      }
      __syncwarp();
      mbarrier_arrive(shared.values.full(task++));
    }
    __syncwarp();
    shared.steps.release(n);
  }
}

// What one consumer warpgroup holds in registers, and the steps on it.
template <class T, bool DROPOUT, Terms TERMS>
struct BiasWarpgroup {
  using Config = BiasConfig;
  using Tile = Config::Tile;
  using Scores = Accumulator<16, Config::kKeys>;
  static constexpr bool kEveryTerm = TERMS == Terms::kEvery;

  const AttentionParams& p;
  const ScoreConstants& constants;
  const BiasShared& shared;
  const int warpgroup;
  const float inverse_scale = 1.0f / constants.scale;
  FragmentDropout<false> dropout;
  const uint32_t queries = Tile::descriptor(shared.queries(0) + warpgroup * 64 * 128);  // of the first chunk
  const uint32_t keys = Tile::descriptor(shared.keys(0));
  Scores s, dp, sum;
  RowVector<16> lse, row_sum;

  __device__ BiasWarpgroup(const AttentionParams& p, const ScoreConstants& constants, const BiasShared& shared,
                           int warpgroup)
      : p(p), constants(constants), shared(shared), warpgroup(warpgroup), dropout(p, 0) {
    sum.clear();
  }

  // From the first chunk's descriptors to another's: worked out while nothing is under way.
  __device__ static __forceinline__ uint32_t offset(uint32_t chunk) {
    return uniform(BiasShared::Chunks::stage(chunk) * (Config::kPlaceBytes / 16));
  }
  // c = A B^T (+ c) over a chunk: A this warpgroup's queries of Q or dO, B the keys of K or V.
  __device__ __forceinline__ void start_product(Scores& c, uint32_t chunk, uint32_t offset, bool accumulate) {
    shared.chunks.wait_full(chunk);
    const uint32_t a = queries + offset, b = keys + offset;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Config::kColumns / 16; ++k)
      wgmma_ss<T, Config::kKeys, 0, 0>(wgmma_registers(c), a + Tile::across(k), b + Tile::across(k),
                                       accumulate || k > 0);
    wgmma_commit();
  }
  // Beside the chunk's product that is under way, those of all further chunks; each place is given back when the next
  // product has started. The last one's is still in use.
  __device__ __forceinline__ void add_products(Scores& c, uint32_t& chunk, int head_dim) {
#pragma unroll 1
    for (int left = Config::chunks(head_dim) - 1; left > 0; --left) {
      start_product(c, chunk + 1, offset(chunk + 1), true);
      wgmma_wait<1>();
      shared.chunks.release(chunk++);
    }
  }

  // Turns at the tensor cores, so that one warpgroup's mathematics hides behind the other's products.
  __device__ __forceinline__ void pass_turn() const { named_barrier_arrive(2 - warpgroup, 2 * kWarpgroupThreads); }

  // Adds dS of a task. Places in the rings: of its first chunk, which becomes that of the next task's, of the tile's
  // bias and of the task's row values.
  __device__ __forceinline__ void add(const BiasStep& step, uint32_t& chunk, uint32_t tile, uint32_t task) {
    shared.biases.wait_full(tile);
    bool prepared = false;
    if constexpr (!kEveryTerm) {
      load_row_values(task);
      prepared = prepare(tile);
    }
    const uint32_t first = offset(chunk), dout = offset(chunk + Config::chunks(p.head_dim));
    named_barrier_wait(1 + warpgroup, 2 * kWarpgroupThreads);
    start_product(s, chunk, first, !kEveryTerm);
    add_products(s, chunk, p.head_dim);
    start_product(dp, chunk + 1, dout, false);
    pass_turn();
    if (kEveryTerm) load_row_values(task);
    wgmma_wait<1>();
    wgmma_settle(s);
    shared.chunks.release(chunk++);
    to_probabilities(step, tile, prepared);
    add_products(dp, chunk, p.head_dim_v);
    wgmma_wait<0>();
    wgmma_settle(dp);
    shared.chunks.release(chunk++);
    add_gradients(step.boundary);
  }

  // The sum to its place in the bias's gradient; the next one begins at zero.
  __device__ __forceinline__ void write(const BiasStep& step) {
    const float factor = 256.0f / p.dropout_keep;
    sum.for_each([&](float& x, int, int) { x *= factor; });
    const int i = step.i0 + first_row_of_warp(warpgroup), j = step.j0;
    T* corner =
        static_cast<T*>(p.dbias.data) + step.batch * p.dbias.batch + step.head * p.dbias.head + i * p.dbias.row + j;
    if (p.dbias.row % 8 == 0) {
      store_fragment<T>(corner, p.dbias.row, p.seqlen_k - j, sum, 0, p.seqlen_q - i);
    } else {
      store_pairs(corner, p.dbias.row, sum, p.seqlen_q - i, p.seqlen_k - j);
    }
    sum.clear();
  }

 private:
  __device__ __forceinline__ void load_row_values(uint32_t task) {
    shared.values.wait_full(task);
    const float* values = shared.row_values(task) + first_row_of_warp(warpgroup);
#pragma unroll
    for (int r = 0; r < RowVector<16>::kCount; ++r) {
      lse.v[r] = values[RowVector<16>::row(r)];
      row_sum.v[r] = values[Config::kQueries + RowVector<16>::row(r)];
    }
    __syncwarp();
    shared.values.release(task);
  }

  // The bias in S before Q K^T is added, in units of 1 / scale: read while no product stands in its way, and one
  // multiply-add less later. In these units bfloat16's lowest numbers overflow to -inf, which they are as good as
  // except in rows that have nothing above them: then it is left to to_probabilities(), and S is zero.
  __device__ __forceinline__ bool prepare(uint32_t tile) {
    if (std::is_same_v<T, BFloat16> && sees_lowest()) {
      s.clear();
      return false;
    }
    for_each_score_pair<T, Config::ScoreTile>(shared.bias(tile), warpgroup, [&](int n, int e, float2 bias) {
      s.x[0][n][e] = bias.x * inverse_scale;
      s.x[0][n][e + 1] = bias.y * inverse_scale;
    });
    return true;
  }

  // P from S. What dropout drops comes out negative.
  __device__ __forceinline__ void to_probabilities(const BiasStep& step, uint32_t tile, bool prepared) {
    const int i0 = step.i0 + first_row_of_warp(warpgroup), j0 = step.j0;
    float scale = prepared ? 1.0f : constants.scale;  // to the units that the terms are added in
    const float factor = prepared ? constants.scale * kLog2E : kLog2E;
    if (kEveryTerm && constants.cap != 0) {
      cap_scores(s, constants);
      scale = 1.0f;
    }
    if (p.alibi_slopes != nullptr) {
      const float slope = prepared ? step.slope * inverse_scale : step.slope;
      add_alibi(s, scale, slope, i0 + step.sequence.offset - j0);
      scale = 1.0f;
    }
    if (!prepared) {
      for_each_score_pair<T, Config::ScoreTile>(shared.bias(tile), warpgroup, [&](int n, int e, float2 bias) {
        s.x[0][n][e] = s.x[0][n][e] * scale + bias.x;
        s.x[0][n][e + 1] = s.x[0][n][e + 1] * scale + bias.y;
      });
    }
    if (step.boundary) hide_invisible<false>(s, p, step.sequence, i0, j0, p.key_mask != nullptr);
    if (std::is_same_v<T, BFloat16> && !prepared && sees_lowest()) {
      s.for_each([](float& x, int, int) { x = x < kLowestBias && x != -CUDART_INF_F ? kLowestBias : x; });
    }
    if (drops()) {
      dropout.batch_head = step.batch * p.heads_q + step.head;
#pragma unroll
      for (int n = 0; n < Config::kKeys / 32; ++n) {
        const DropoutWords words = dropout.draw(i0 / 16, j0 / 16 + 2 * n, i0 / 16, j0 / 16 + 2 * n + 1);
        const uint2 dropped[2] = {dropout.dropped(words, 0), dropout.dropped(words, 1)};
        exponentiate(4 * n, 4, factor,
                     [&](int column, int e) { return dropout.sign_if_dropped(dropped[column / 2 % 2], column, e); });
      }
    } else {
      exponentiate(0, Config::kKeys / 8, factor, [](int, int) { return 0u; });
    }
  }
  __device__ __forceinline__ bool drops() const { return DROPOUT && (!kEveryTerm || p.dropout_keep < 256); }
  // The lowest finite biases overflow in log2 units. That matters in rows that have nothing above them.
  __device__ __forceinline__ bool sees_lowest() const { return any_lane(fminf(lse.v[0], lse.v[1]) < -0x1p120f); }
  template <class Sign>
  __device__ __forceinline__ void exponentiate(int first_n, int count, float factor, Sign sign) {
#pragma unroll
    for (int n = first_n; n < first_n + count; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = s.x[0][n][e];
        x = __uint_as_float(__float_as_uint(exp2_fast(x * factor - lse.v[e / 2])) | sign(n, e));
      }
    }
  }

  // sum += P (dP - row_sum), with dP masked by dropout. At a boundary dP may be NaN where nothing is visible.
  __device__ __forceinline__ void add_gradients(bool boundary) {
    const auto add = [&](auto gradient) {
#pragma unroll
      for (int n = 0; n < Config::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float probability = s.x[0][n][e];
          sum.x[0][n][e] += fabsf(probability) * (gradient(probability, dp.x[0][n][e]) - row_sum.v[e / 2]);
        }
      }
    };
    if (boundary) {
      add([](float probability, float x) { return probability > 0 ? x : 0.0f; });
    } else if (drops()) {
      add([](float probability, float x) { return probability < 0 ? 0.0f : x; });
    } else {
      add([](float, float x) { return x; });
    }
  }
};

template <class T, bool DROPOUT, Terms TERMS>
__device__ __forceinline__ void consume(const AttentionParams& p, const BiasMaps& maps, const BiasShared& shared,
                                        int warpgroup) {
  BiasWarpgroup<T, DROPOUT, TERMS> state(p, maps.scores, shared, warpgroup);
  if (warpgroup == 1) state.pass_turn();   // the first turn is the first warpgroup's
  uint32_t chunk = 0, tile = 0, task = 0;  // places in the rings
  bool has_bias = false;
  for (uint32_t n = 0;; ++n) {
    shared.steps.wait_full(n);
    const BiasStep& step = shared.step(n);
    const BiasStep::Kind kind = step.kind;
    if (kind == BiasStep::kEnd) return;
    if (kind == BiasStep::kTask) {
      state.add(step, chunk, tile, task++);
      has_bias = true;
    } else {
      state.write(step);
      if (has_bias) shared.biases.release(tile++);
      has_bias = false;
    }
    __syncwarp();
    shared.steps.release(n);
  }
}

template <class T, bool DROPOUT, Terms TERMS>
__global__ void __launch_bounds__(BiasConfig::kThreads, 1)
    bias_gradient_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ BiasMaps maps,
                         const __grid_constant__ BiasTiles tiles) {
  using Config = BiasConfig;
  extern __shared__ __align__(1024) char shared_memory[];
  const BiasShared shared(shared_memory);
  const int warpgroup = uniform(threadIdx.x / kWarpgroupThreads);
  init_barriers(shared);
  __syncthreads();
  if (warpgroup == Config::kWarpgroups) {
    give_registers_back<Config::kProducerRegisters>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    if (warp == 0) copy_tiles(p, maps, shared);
    if (warp == 1) make_steps(p, tiles, shared);
    if (warp == 2) copy_row_values(p, shared);
  } else {
    take_registers<Config::kConsumerRegisters>();
    consume<T, DROPOUT, TERMS>(p, maps, shared, warpgroup);
  }
}

template <class T, bool DROPOUT, Terms TERMS>
void run_bias_gradient(const AttentionParams& p, cudaStream_t stream) {
  const BiasTiles tiles(p);
  if (tiles.count() == 0) return;
  const auto kernel = bias_gradient_kernel<T, DROPOUT, TERMS>;
  static SharedMemoryPermit permit;
  permit.ask(kernel, BiasShared::kBytes);
  const int ctas = static_cast<int>(std::min<int64_t>(tiles.count(), multiprocessor_count()));
  kernel<<<ctas, BiasConfig::kThreads, BiasShared::kBytes, stream>>>(p, BiasMaps(p), tiles);
  check_launch("bias_gradient");
}

}  // namespace hf_flash::sm90
