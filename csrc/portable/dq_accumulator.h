// Where a backward kernel sums dQ in float32 before it is converted: units of 64 or 8 rows and head_dim columns, in the
// order of m16n8 tensor-core accumulators, so that a warp adds 512 neighbouring bytes at a time. Every sequence of a
// packed batch starts a unit of its own. Behind the units stand counters: of the additions, for the turns of a fixed
// order, which the deterministic mode has and kernels whose last addition to a query tile writes dq itself, and for
// kernels whose first addition stores, so that nothing need be zeroed; or of what kernels zero themselves.
#pragma once

#include <cstdint>

#include "attention/divided_work.h"
#include "attention/sequence.h"

namespace hf_flash {

// TILE_ROWS: of the passes before and after. SLICED: 32 columns of all rows of a unit lie side by side, so that a slice
// of columns is one piece.
template <int TILE_ROWS, bool SLICED = false>
struct DqAccumulatorOf {
  static constexpr int kTileRows = TILE_ROWS;
  // No product has 80 rows of dQ: those of such tiles are summed transposed, 8 rows a unit.
  static constexpr bool kTransposed = TILE_ROWS % 64 != 0;
  static constexpr int kUnitRows = kTransposed ? 8 : TILE_ROWS;
  static constexpr int kCounters = kTransposed ? 1 : 2;  // a unit: one for each 32 rows, the shortest query tile

  float* data = nullptr;        // units of kUnitRows * columns
  int32_t* counters = nullptr;  // kCounters for each unit; null where nobody counts
  int64_t batch_units = 0;      // from one sequence to the next; 0 when packed
  int64_t head_units = 0;       // from one query head to the next
  int32_t columns = 0;          // head_dim rounded up to what the kernel computes, a multiple of 32
  bool packed = false;
  // The last turn writes dq, of rows that are computed and see keys; the kernel of the row sums writes zeros to the
  // other rows of dq.
  bool finishes_dq = false;
  bool zeroes_ahead = false;  // see ZeroedPieces
  // The first addition to a query tile, of so many rows, stores, and nobody has to zero them; tiles that nothing was
  // added to have no sums. 0: the additions just add.
  int32_t stored_rows = 0;
  // The kernel that adds writes zeros ahead of itself, a piece of about 32 KB at a time: so many of a sequence's query
  // head some CTA has begun with, and so many are there. Null: they are written before, where there need be any.
  struct ZeroedPieces {
    int32_t begun, done;
  };
  ZeroedPieces* zeroed = nullptr;              // of each sequence and query head
  int32_t heads = 0;                           // of q
  bool ordered = false;                        // the additions are
  DividedWork divided;                         // whose description the kernel of the row sums writes
  static constexpr int32_t kStored = 1 << 24;  // more than there are key tiles

  DqAccumulatorOf() = default;
  DqAccumulatorOf(const AttentionParams& p, void* workspace, int32_t columns, bool finishes_dq = false,
                  int32_t stored_rows = 0, bool zeroes_ahead = false)  // if nobody counts
      : data(static_cast<float*>(workspace)),
        columns(columns),
        packed(p.packed()),
        finishes_dq(finishes_dq),
        zeroes_ahead(zeroes_ahead),
        stored_rows(stored_rows),
        heads(p.heads_q),
        ordered(p.deterministic || finishes_dq) {
    head_units = packed ? p.total_q / kUnitRows + p.batch + 1 : units_of(p.seqlen_q);
    batch_units = packed ? 0 : head_units * p.heads_q;
    int32_t* const behind = reinterpret_cast<int32_t*>(data + units(p) * kUnitRows * columns);
    if (counts()) counters = behind;
    if (zeroes_ahead) zeroed = reinterpret_cast<ZeroedPieces*>(behind);
  }

  HF_FLASH_HOST_DEVICE bool stores_first() const { return stored_rows > 0; }
  bool counts() const { return ordered || stores_first(); }
  HF_FLASH_HOST_DEVICE bool zeroed_before() const { return !stores_first() && zeroed == nullptr; }
  int64_t units(const AttentionParams& p) const { return head_units * p.heads_q * (packed ? 1 : p.batch); }
  // Who finishes dq reads whole tiles of query rows, two units, of which a sequence's last one may have but the first.
  int64_t bytes(const AttentionParams& p) const {
    const int64_t unit = 4 * int64_t{kUnitRows} * columns;
    const int64_t pieces = zeroes_ahead ? int64_t{p.batch} * heads * sizeof(ZeroedPieces) : 0;
    return units(p) * (unit + (counts() ? 4 * kCounters : 0)) + pieces + (finishes_dq ? unit : 0);
  }

  HF_FLASH_HOST_DEVICE static int32_t units_of(int32_t rows) { return (rows + kUnitRows - 1) / kUnitRows; }
  // So many of `count` rows from `row` on have a place: the last unit of a sequence has places for all of its own.
  HF_FLASH_HOST_DEVICE static int32_t rows_of(const Sequence& sequence, int32_t row, int32_t count) {
    const int32_t left = units_of(sequence.len_q - row) * kUnitRows;
    return count < left ? count : left;
  }
  HF_FLASH_HOST_DEVICE int64_t unit(const Sequence& sequence, int32_t b, int32_t head, int32_t row) const {
    const int64_t first = packed ? sequence.first_q / kUnitRows + b : 0;
    return b * batch_units + head * head_units + first + row / kUnitRows;
  }

  // The 16 rows, transposed 8, from `row` (a multiple of as many) on of sequence b.
  HF_FLASH_HOST_DEVICE float* rows(const Sequence& sequence, int32_t b, int32_t head, int32_t row) const {
    return data + (unit(sequence, b, head, row) * kUnitRows + row % kUnitRows) * columns;
  }

  // The 16 rows and 32 columns from `row` and `column` on, four blocks of 8 columns side by side. Not transposed.
  HF_FLASH_HOST_DEVICE float* block(const Sequence& sequence, int32_t b, int32_t head, int32_t row,
                                    int32_t column) const {
    if constexpr (!SLICED) return rows(sequence, b, head, row) + 16 * column;
    const int32_t in_unit = row % kUnitRows;
    return rows(sequence, b, head, row - in_unit) + kUnitRows * column + 32 * in_unit;
  }

  // How many key tiles have added to the query tile from `row` on; or how many have come, plus kStored once the first
  // one's sums are there.
  HF_FLASH_HOST_DEVICE int32_t* counter(const Sequence& sequence, int32_t b, int32_t head, int32_t row) const {
    return counters + unit(sequence, b, head, row) * kCounters + row % kUnitRows / 32;
  }

  HF_FLASH_HOST_DEVICE ZeroedPieces& zeroed_pieces(int32_t b, int32_t head) const {
    return zeroed[int64_t{b} * heads + head];
  }
  // Units of a piece; the last one of a sequence and head may have fewer.
  HF_FLASH_HOST_DEVICE static constexpr int32_t units_of_piece(int32_t columns) {
    return kUnitRows * columns < 8192 ? 8192 / (kUnitRows * columns) : 1;
  }
  HF_FLASH_HOST_DEVICE static int32_t pieces_of(const Sequence& sequence, int32_t columns) {
    return (units_of(sequence.query_end) + units_of_piece(columns) - 1) / units_of_piece(columns);
  }

  // Are there sums of the rows from `row` on?
  HF_FLASH_HOST_DEVICE bool has_sums(const Sequence& sequence, int32_t b, int32_t head, int32_t row) const {
    if (zeroed != nullptr) return row < sequence.query_end && zeroed_pieces(b, head).done != 0;
    return !stores_first() || *counter(sequence, b, head, row / stored_rows * stored_rows) != 0;
  }

#ifdef __CUDACC__
  // Where a lane's element e = 0 .. 3 of the m16n8 block with first column 8 * block lies within its 16 rows. e = 0, 1
  // stand at row lane / 4, columns 2 (lane % 4) + {0, 1}, e = 2, 3 at the same columns of row lane / 4 + 8. One red
  // instruction adds all four where the architecture has vectors of them, otherwise it adds the same e of all lanes.
  __device__ static int32_t element(int32_t block, int32_t lane, int32_t e) {
#if __CUDA_ARCH__ >= 900
    return block * 128 + lane * 4 + e;
#else
    return block * 128 + e * 32 + lane;
#endif
  }
  // The same of transposed units, whose m16n8 blocks have 16 columns of dQ as rows and the unit's rows as columns.
  __device__ static int32_t transposed_element(int32_t columns, int32_t unit, int32_t column_block, int32_t lane,
                                               int32_t e) {
    return element(unit * (columns / 16) + column_block, lane, e);
  }
#endif
};

using DqAccumulator = DqAccumulatorOf<64>;
using SlicedDqAccumulator = DqAccumulatorOf<64, true>;
using TallDqAccumulator = DqAccumulatorOf<80>;

}  // namespace hf_flash
