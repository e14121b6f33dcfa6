// The gradient of a bias that broadcasts: dS summed over the dimensions of size 1. One CTA owns a tile of the bias's
// own gradient and walks all the score tiles that it was added to: it computes S = Q K^T and dP = dO V^T again, adds dS
// up in registers and writes the sum once. So nothing has to be zeroed, no addition is atomic, and every run gives the
// same bits. Head dimensions are walked in chunks, so one kernel serves them all, on Hopper too where its own cannot.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "attention/score_gradient.cuh"
#include "portable/cuda_call.h"
#include "sm80/bias_tile.cuh"
#include "sm80/bias_walk.cuh"
#include "sm80/instances.h"
#include "tile/copy.cuh"
#include "tile/matmul.cuh"
#include "tile/reduce.cuh"
#include "tile/store.cuh"

namespace hf_flash::sm80 {

// Starts copies: one chunk of columns of a task's Q and K, or of its dO and V, after the other, task by task.
struct BiasLoader {
  using Config = BiasConfig;
  const AttentionParams& p;
  const BiasSources* const tasks;
  const uint32_t shared;
  int task, chunk;  // what comes next

  // Into a place that nobody reads any more. Past the last task the group of copies is empty.
  __device__ __forceinline__ void start(uint32_t place) {
    const BiasSources& from = tasks[task % Config::kTasks];
    const int score_chunks = Config::chunks(p.head_dim);
    if (from.exists) {
      const bool values = chunk >= score_chunks;
      const int column = Config::kColumns * (values ? chunk - score_chunks : chunk);
      const Sequence& sequence = from.sequence;
      const TileCopy<Config::Tile, Config::kThreads> queries((values ? from.dout : from.q) + 2 * column,
                                                             values ? p.dout.row : p.q.row,
                                                             (values ? p.head_dim_v : p.head_dim) - column);
      queries.start_load(shared + place, from.i0, sequence.query_begin, sequence.query_end);
      const TileCopy<Config::Tile, Config::kThreads> keys((values ? from.v : from.k) + 2 * column,
                                                          values ? p.v.row : p.k.row, queries.row_bytes / 2);
      keys.start_load(shared + place + Config::Tile::kBytes, from.j0, sequence.key_begin, sequence.key_end);
    }
    copy_async_commit();
    if (++chunk == score_chunks + Config::chunks(p.head_dim_v)) ++task, chunk = 0;
  }
};

// What one warp holds in registers: 32 queries by 64 keys of S and P, of dP, and of the sum.
template <class T, bool DROPOUT, bool EVERY>
struct BiasWarp {
  static constexpr bool kBeside = !EVERY;  // the exponentials beside products; with every term that spills
  using Config = BiasConfig;
  using Tile = Config::Tile;
  static constexpr int kRows = Config::kWarpQueries, kCols = Config::kWarpKeys;

  const AttentionParams& p;
  const int row0, col0;  // within the tile
  using RowReader = BlockReader<Tile, Order::kDown>;
  using KeyReader = BlockReader<Tile, Order::kAcross>;
  const uint32_t row_reader, key_reader;  // their first registers
  const uint32_t bias_tile;
  FragmentDropout<false> dropout;
  Accumulator<kRows, kCols> s, dp, sum;
  RowVector<kRows> lse, row_sum;

  __device__ BiasWarp(const AttentionParams& p, uint32_t shared, int warp)
      : p(p),
        row0(uniform(warp % Config::kRowWarps * kRows)),
        col0(uniform(warp / Config::kRowWarps * kCols)),
        row_reader(RowReader(shared, row0).base[0]),
        key_reader(KeyReader(shared + Tile::kBytes, col0).base[0]),
        bias_tile(shared + Config::kBias),
        dropout(p, 0) {
    sum.clear();
  }

  // Fetches lse; it is needed when S is complete.
  __device__ __forceinline__ void begin(const BiasSources& task) {
#pragma unroll
    for (int r = 0; r < RowVector<kRows>::kCount; ++r) {
      const int i = task.i0 + row0 + RowVector<kRows>::row(r);
      lse.v[r] = task.sequence.computes(i) ? task.lse[i] : CUDART_INF_F;
    }
    fetch_row_sum(task);
    s.clear();
  }
  // What dP begins with: minus the row sum, as if nothing were dropped.
  __device__ __forceinline__ void fetch_row_sum(const BiasSources& task) {
    const float factor = p.dropout_keep / -256.0f;
#pragma unroll
    for (int r = 0; r < RowVector<kRows>::kCount; ++r) {
      const int i = task.i0 + row0 + RowVector<kRows>::row(r);
      row_sum.v[r] = task.sequence.computes(i) ? task.row_sum[i] * factor : 0.0f;
    }
  }

  // c += A B^T over one chunk of at most `columns` columns: A queries of Q or dO, B keys of K or V. beside(k): other
  // work, for the time that a quarter of the products take.
  template <class Beside>
  __device__ __forceinline__ void multiply(Accumulator<kRows, kCols>& c, uint32_t place, int columns,
                                           const Beside& beside) const {
    const RowReader rows = RowReader::from(row_reader);
    const KeyReader keys = KeyReader::from(key_reader);
    const auto step = [&](int k) {
      OperandA<kRows, 16> a;
      load_operand(a, 0, rows, k, place);
      multiply_by_transpose<T, kCols / 16>(c, 0, a, 0, keys, 0, k, place);
    };
    if (columns >= Config::kColumns) {
#pragma unroll
      for (int k = 0; k < Config::kColumns / 16; ++k) step(k), beside(k);
    } else {
#pragma unroll
      for (int k = 0; k < Config::kColumns / 16; ++k) {
        if (16 * k < columns) step(k);
        beside(k);
      }
    }
  }

  // This warp's part of the bias that all tasks have.
  __device__ __forceinline__ void start_bias(const BiasWalk& walk) const {
    if (!copies_bias<EVERY>(p)) return;
    const auto place = [&](int row, int chunk) {
      return bias_tile + Config::BiasTile::offset(row0 + row, col0 / 8 + chunk);
    };
    start_bias_copy<kRows, kCols>(p, walk.batch_begin, walk.head_begin, walk.i_begin + row0, p.seqlen_q,
                                  walk.j_begin + col0, p.seqlen_k, place);
  }
  __device__ __forceinline__ void add_bias() {
    using Reader = BlockReader<typename Config::BiasTile, Order::kDown>;
    add_bias_tile<T>(s, Reader(opaque(bias_tile), row0, col0 / 16));
  }

  // S, complete, becomes the logarithms of P. dP begins with minus the row sum, which then needs no subtraction.
  __device__ __forceinline__ void complete_scores(const BiasTask& task) {
    const int i0 = task.i0 + row0, j0 = task.j0 + col0;
    ScoreExtras<T, false, EVERY> extras(p, task.batch, task.head);
    extras.scale_and_cap(s);
#pragma unroll
    for (int r = 0; r < RowVector<kRows>::kCount; ++r) {
      const float log_sum = lse_for_gradient(lse.v[r]);
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
        for (int e = 2 * (r % 2); e < 2 * (r % 2) + 2; ++e) {
          s.x[r / 2][n][e] -= log_sum;
          dp.x[r / 2][n][e] = row_sum.v[r];
        }
      }
    }
    if (copies_bias<EVERY>(p)) {
      add_bias();
      extras.bias = nullptr;
    }
    extras.add(s, task.sequence, i0, j0);
    if (task.boundary) hide_invisible<false, !EVERY>(s, p, task.sequence, i0, j0, p.key_mask != nullptr);
  }
  // A quarter of them becomes P.
  __device__ __forceinline__ void exponentiate(int quarter) {
    constexpr int kQuarter = kCols / 8 / (Config::kColumns / 16);
#pragma unroll
    for (int m = 0; m < kRows / 16; ++m) {
#pragma unroll
      for (int n = quarter * kQuarter; n < (quarter + 1) * kQuarter; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s.x[m][n][e] = exp2_fast(s.x[m][n][e]);
      }
    }
  }

  // sum += P (dP - row_sum), with dP masked by dropout.
  __device__ __forceinline__ void add(const BiasSources& task) {
    if (DROPOUT && (!EVERY || p.dropout_keep < 256)) drop(task);
#pragma unroll
    for (int m = 0; m < kRows / 16; ++m) {
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.x[m][n][e] += s.x[m][n][e] * dp.x[m][n][e];
      }
    }
  }
  __device__ __forceinline__ void drop(const BiasSources& task) {
    static_assert(kRows == 32);  // two 16 x 16 blocks a draw, one above the other
    dropout.batch_head = task.batch * p.heads_q + task.head;
    const int i_block = (task.i0 + row0) / 16, j_block = (task.j0 + col0) / 16;
    fetch_row_sum(task);  // again, since registers are short
#pragma unroll
    for (int block = 0; block < kCols / 16; ++block) {
      const DropoutWords words = dropout.draw(i_block, j_block + block, i_block + 1, j_block + block);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 2 * block; n < 2 * block + 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (!dropout.keeps(words, m, n, e)) dp.x[m][n][e] = row_sum.v[2 * m + e / 2];
          }
        }
      }
    }
  }
};

// The tile's sum, or its sums over rows, columns or both, to the bias's gradient.
template <class T, class Warp>
struct BiasWriter {
  using Config = BiasConfig;
  static constexpr int kRows = Config::kWarpQueries, kCols = Config::kWarpKeys;
  const AttentionParams& p;
  const BiasWalk walk;
  float* const partial;  // in shared memory, [warps side by side or one above the other][row or column of the tile]

  __device__ void write(const Warp& warp) const {
    if (p.dbias.row != 0 && p.dbias.col != 0) {
      p.dbias.dtype == DType::kFloat32 ? write_tile<float>(warp) : write_tile<T>(warp);
    } else if (p.dbias.row != 0) {
      sum_columns(warp);
    } else {
      sum_rows(warp);
    }
  }

 private:
  __device__ int64_t place(int i, int j) const {
    return walk.batch_begin * p.dbias.batch + walk.head_begin * p.dbias.head + i * p.dbias.row + j * p.dbias.col;
  }
  __device__ void write_one(int i, int j, float x) const {
    if (p.dbias.dtype == DType::kFloat32) {
      static_cast<float*>(p.dbias.data)[place(i, j)] = x;
    } else {
      round_to(x, static_cast<T*>(p.dbias.data)[place(i, j)]);
    }
  }

  template <class B>
  __device__ void write_tile(const Warp& warp) const {
    const int i = walk.i_begin + warp.row0, j = walk.j_begin + warp.col0;
    if constexpr (!std::is_same_v<B, float>) {
      if (((p.dbias.row | p.dbias.head | p.dbias.batch | p.seqlen_k) & 7) == 0 &&
          reinterpret_cast<uintptr_t>(p.dbias.data) % 16 == 0) {
#pragma unroll
        for (int m = 0; m < kRows / 16; ++m)
          store_fragment<B>(static_cast<B*>(p.dbias.data) + place(i + 16 * m, j), p.dbias.row, p.seqlen_k - j,
                            reinterpret_cast<const Accumulator<16, kCols>&>(warp.sum.x[m]), 0, p.seqlen_q - i - 16 * m);
        return;
      }
    }
    store_pairs(static_cast<B*>(p.dbias.data) + place(i, j), p.dbias.row, warp.sum, p.seqlen_q - i, p.seqlen_k - j);
  }

  // One sum a row of the tile: over the lane's columns, the quad's lanes and the warps side by side, in this order.
  __device__ void sum_columns(const Warp& warp) const {
    const RowVector<kRows> sums = lane_row_sum(warp.sum);
#pragma unroll
    for (int r = 0; r < RowVector<kRows>::kCount; ++r) {
      const float x = quad_sum(sums.v[r]);
      if (lane_col() == 0) {
        partial[warp.col0 / kCols * Config::kQueries + warp.row0 + RowVector<kRows>::row(r)] = x;
      }
    }
    __syncthreads();
    const int i = walk.i_begin + threadIdx.x;
    if (threadIdx.x >= Config::kQueries || i >= p.seqlen_q) return;
    write_one(i, 0, total(Config::kKeyWarps, Config::kQueries));
  }

  // One sum a column of the tile, likewise; where columns are summed too, one thread adds them up in order.
  __device__ void sum_rows(const Warp& warp) const {
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float x = 0;
#pragma unroll
        for (int m = 0; m < kRows / 16; ++m) x += warp.sum.x[m][n][e] + warp.sum.x[m][n][e + 2];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) x += shuffle_xor(x, lanes);
        if (lane_row() == 0) partial[warp.row0 / kRows * Config::kKeys + warp.col0 + 8 * n + lane_col() + e] = x;
      }
    }
    __syncthreads();
    const int j = walk.j_begin + threadIdx.x;
    const float sum = threadIdx.x < Config::kKeys ? total(Config::kRowWarps, Config::kKeys) : 0.0f;
    if (p.dbias.col != 0) {
      if (threadIdx.x < Config::kKeys && j < p.seqlen_k) write_one(0, j, sum);
      return;
    }
    __syncthreads();
    if (threadIdx.x < Config::kKeys) partial[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float all = 0;
    for (int column = 0; column < Config::kKeys; ++column) all += partial[column];
    write_one(0, 0, all);
  }

  // Of this thread's row or column over the warps.
  __device__ float total(int warps, int stride) const {
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += partial[warp * stride + threadIdx.x];
    return sum;
  }
};

template <class T, bool DROPOUT, Terms TERMS>
__global__ void __launch_bounds__(BiasConfig::kThreads, 1)
    bias_gradient_kernel(const __grid_constant__ AttentionParams p, const BiasGrid grid) {
  using Config = BiasConfig;
  using Warp = BiasWarp<T, DROPOUT, TERMS == Terms::kEvery>;
  extern __shared__ __align__(128) char shared_memory[];
  auto* const tasks = reinterpret_cast<BiasSources*>(shared_memory + Config::kTaskPlace);
  const uint32_t shared = shared_address(shared_memory);
  auto& next = *reinterpret_cast<int64_t*>(shared_memory + Config::kNext);
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) next = 0;
    __syncwarp();
    grid.walk(p).list(p, tasks, Config::kTasks, next);
  }
  __syncthreads();

  BiasLoader loader{p, tasks, shared, 0, 0};
  Warp warp(p, shared, uniform(threadIdx.x / 32));
  warp.start_bias(grid.walk(p));
#pragma unroll
  for (int place = 0; place < Config::kPlaces - 1; ++place) loader.start(place * Config::kPlaceBytes);
  // Each step finds its chunk in shared memory and starts the copies of a later one, into the place that the step
  // before has left.
  uint32_t place = 0, free_place = (Config::kPlaces - 1) * Config::kPlaceBytes;
  const auto multiply_chunk = [&](auto& c, int columns, const auto& beside) {
    copy_async_wait<Config::kPlaces - 2>();
    __syncthreads();
    loader.start(free_place);
    warp.multiply(c, place, columns, beside);
    free_place = place;
    place = place == (Config::kPlaces - 1) * Config::kPlaceBytes ? 0 : place + Config::kPlaceBytes;
  };
  const auto multiply = [&](auto& c, int columns) {
#pragma unroll 1
    for (; columns > 0; columns -= Config::kColumns) multiply_chunk(c, columns, [](int) {});
  };
  for (int n = 0; tasks[n % Config::kTasks].exists; ++n) {
    // The half before is over in all warps once they have met in the first task of this one.
    if (n % (Config::kTasks / 2) == 1 && n > 1 && threadIdx.x < 32)
      grid.walk(p).list(p, tasks + (n + Config::kTasks / 2 - 1) % Config::kTasks, Config::kTasks / 2, next);
    __syncwarp();
    const BiasSources& task = tasks[n % Config::kTasks];
    warp.begin(task);
    multiply(warp.s, p.head_dim);
    warp.complete_scores(task);
    if constexpr (!Warp::kBeside) {
#pragma unroll
      for (int k = 0; k < Config::kColumns / 16; ++k) warp.exponentiate(k);
    }
    multiply_chunk(warp.dp, p.head_dim_v, [&](int k) {
      if constexpr (Warp::kBeside) warp.exponentiate(k);
    });
    multiply(warp.dp, p.head_dim_v - Config::kColumns);
    warp.add(task);
  }
  copy_async_wait<0>();
  __syncthreads();
  const float factor = 256.0f / p.dropout_keep;
  warp.sum.for_each([&](float& x, int, int) { x *= factor; });
  BiasWriter<T, Warp>{p, grid.walk(p), reinterpret_cast<float*>(shared_memory)}.write(warp);
}

template <class T, bool DROPOUT, Terms TERMS>
void run_bias_gradient(const AttentionParams& p, cudaStream_t stream) {
  const auto kernel = bias_gradient_kernel<T, DROPOUT, TERMS>;
  static SharedMemoryPermit permit;
  permit.ask(kernel, BiasConfig::kSharedBytes);
  BiasGrid grid(p);
  for (; grid.tiles > 0 && grid.first_batch < grid.batch; grid.first_batch += TileSchedule::kMaxBatch) {
    kernel<<<grid.blocks(), BiasConfig::kThreads, BiasConfig::kSharedBytes, stream>>>(p, grid);
    check_launch("bias_gradient");
  }
}

}  // namespace hf_flash::sm80
