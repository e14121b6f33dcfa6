// How Hopper's kernel of a broadcast bias's gradient divides its work: steps, shared memory, tensor maps.
#pragma once

#include "attention/bias_walk.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/score_math.cuh"
#include "sm90/tma_tile.cuh"

namespace hf_flash::sm90 {

// Q and K, or dO and V, come 64 columns at a time, a pair of tiles that belong together in one place. So the memory and
// the code are the same for every head dimension.
struct BiasConfig {
  static constexpr int kQueries = BiasTiles::kQueries, kKeys = BiasTiles::kKeys;
  static constexpr int kColumns = 64;  // of the head dimension, a chunk
  static constexpr int kWarpgroups = 2, kWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // with 24 the walk over tasks spills
  using Tile = SwizzledTile<128, kColumns>;
  using ScoreTile = SwizzledTile<kQueries, kKeys>;  // of the bias
  static_assert(Tile::kRows == kQueries && Tile::kRows == kKeys);

  // Shared memory: chunks, of which a task of head dimension 64 has two; the bias of this tile of the gradient and of
  // the next one; lse and row sums of two tasks; steps; barriers.
  static constexpr int kStages = 5, kBiasStages = 2, kValueStages = 2, kSteps = 6;
  static_assert(kStages > 256 / kColumns);  // Q and the first of dO: a turn gets them while the other warpgroup waits
  static constexpr int kPlaceBytes = 2 * Tile::kBytes;
  static constexpr int kBias = kStages * kPlaceBytes;
  static constexpr int kValues = kBias + kBiasStages * ScoreTile::kBytes;
  static constexpr int kStep = kValues + kValueStages * 2 * kQueries * static_cast<int>(sizeof(float));

  __device__ static int chunks(int head_dim) { return (head_dim + kColumns - 1) / kColumns; }
};

// A CTA's work is one stream of steps. Those of a tile of the gradient: its tasks, be there any, then the writing of
// their sum to (i0, j0) of its batch and head.
struct BiasStep : BiasTask {
  enum Kind { kTask, kWrite, kEnd };
  Kind kind;
  float slope;  // ALiBi

  __device__ void prepare(const AttentionParams& p) {
    if (p.alibi_slopes != nullptr) slope = p.alibi_slopes[batch * p.alibi_batch_stride + head];
  }
};

struct BiasShared {
  using Config = BiasConfig;
  using Steps = Ring<Config::kSteps>;
  using Chunks = Ring<Config::kStages>;
  using Biases = Ring<Config::kBiasStages>;
  using Values = Ring<Config::kValueStages>;
  static constexpr int kBarriers = (Config::kStep + Config::kSteps * static_cast<int>(sizeof(BiasStep)) + 7) / 8 * 8;
  static constexpr int kBytes = kBarriers + Steps::kBytes + Chunks::kBytes + Biases::kBytes + Values::kBytes;
  static_assert(kBytes <= 227 * 1024);

  char* memory;
  uint32_t base;
  Steps steps;
  Chunks chunks;
  Biases biases;
  Values values;

  __device__ explicit BiasShared(char* memory)
      : memory(memory),
        base(shared_address(memory)),
        steps(base + kBarriers),
        chunks(steps.barriers + Steps::kBytes),
        biases(chunks.barriers + Chunks::kBytes),
        values(biases.barriers + Biases::kBytes) {}

  __device__ void init() const {
    steps.init(warps(Config::kWarps + 2));  // the copying warp and the one that brings row values read them too
    chunks.init(warps(Config::kWarps));
    biases.init(warps(Config::kWarps));
    values.init(warps(Config::kWarps), kWarpThreads);  // each lane brings some
  }
  // By place in their rings: steps; chunks, with queries first; tiles of the gradient that have tasks; tasks.
  __device__ BiasStep& step(uint32_t n) const {
    return reinterpret_cast<BiasStep*>(memory + Config::kStep)[Steps::stage(n)];
  }
  __device__ uint32_t queries(uint32_t chunk) const { return base + Chunks::stage(chunk) * Config::kPlaceBytes; }
  __device__ uint32_t keys(uint32_t chunk) const { return queries(chunk) + Config::Tile::kBytes; }
  __device__ uint32_t bias(uint32_t tile) const {
    return base + Config::kBias + Biases::stage(tile) * Config::ScoreTile::kBytes;
  }
  // lse in log2 units, then row sums.
  __device__ float* row_values(uint32_t task) const {
    return reinterpret_cast<float*>(memory + Config::kValues) + Values::stage(task) * 2 * Config::kQueries;
  }
};

struct BiasMaps {
  CUtensorMap q, k, v, dout, bias;
  ScoreConstants scores;

  explicit BiasMaps(const AttentionParams& p) : scores(p) {
    constexpr int kRows = BiasConfig::Tile::kRows;
    const int batch = p.packed() ? 1 : p.batch;
    const int64_t rows_q = p.packed() ? p.total_q : p.seqlen_q, rows_k = p.packed() ? p.total_k : p.seqlen_k;
    q = tensor_map(p.q, p.dtype, batch, rows_q, p.heads_q, p.head_dim, kRows);
    k = tensor_map(p.k, p.dtype, batch, rows_k, p.heads_k, p.head_dim, kRows);
    v = tensor_map(p.v, p.dtype, batch, rows_k, p.heads_k, p.head_dim_v, kRows);
    dout = tensor_map(p.dout, p.dtype, batch, rows_q, p.heads_q, p.head_dim_v, kRows);
    bias = bias_map(p, kRows);
  }
};

}  // namespace hf_flash::sm90
