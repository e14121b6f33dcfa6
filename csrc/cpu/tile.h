// Tiles of the compute type in a worker's scratch memory: loading rows of the tensors into them, multiplying them,
// writing them back. A tile of rows has `width` columns a row, a head dimension rounded up to whole vectors and padded
// with zeros; a tile of scores is transposed, [key][query], so that softmax runs along whole vectors of queries.
#pragma once

#include "cpu/vector.h"

namespace hf_flash::cpu::HF_FLASH_CPU_ISA {
namespace {

constexpr int kRegisterRows = 4;  // rows of a product that are held in registers

inline int round_down(int x, int multiple) { return x - x % multiple; }
inline int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

HF_FLASH_INLINE Range intersect(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// ---- Between tensors and tiles ----------------------------------------------------------------------------------

template <class Element>
Element* row_pointer(const Rows& rows, int32_t batch, int64_t row, int32_t head) {
  return static_cast<Element*>(rows.data) + batch * rows.batch + row * rows.row + head * rows.head;
}

// tile[i][d] = rows[i][d] for i in range.
template <class Element, class T>
void load_rows(T* __restrict tile, int width, const Element* __restrict rows, int64_t stride, Range range, int dim) {
  for (int i = range.begin; i < range.end; ++i) {
    const Element* __restrict from = rows + i * stride;
    T* __restrict to = tile + int64_t{i} * width;
    for (int d = 0; d < dim; ++d) to[d] = to_compute(from[d]);
  }
}

// Visits the columns of a matrix that is read by rows: read(i, j) is one element, write(j, i, x) gets a vector of
// column j, rows i and on; what lies outside `rows` is zero there.
template <class T, class Read, class Write>
HF_FLASH_INLINE void for_each_column(Range rows, Range columns, const Read& read, const Write& write) {
  constexpr int kSide = kLanes<T>;
  for (int i0 = round_down(rows.begin, kSide); i0 < rows.end; i0 += kSide) {
    for (int j0 = round_down(columns.begin, kSide); j0 < columns.end; j0 += kSide) {
      const Range inside = intersect({j0, j0 + kSide}, columns);
      Vector<T> square[kSide];
#pragma GCC unroll 16
      for (int r = 0; r < kSide; ++r) {
        T row[kSide] __attribute__((aligned(64))) = {};
        if (i0 + r < rows.begin || i0 + r >= rows.end) {
        } else if (inside.end - inside.begin == kSide) {
          for (int c = 0; c < kSide; ++c) row[c] = read(i0 + r, j0 + c);
        } else {
          for (int j = inside.begin; j < inside.end; ++j) row[j - j0] = read(i0 + r, j);
        }
        square[r] = load<T>(row);
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int c = 0; c < kSide; ++c)
        if (j0 + c >= inside.begin && j0 + c < inside.end) write(j0 + c, i0, square[c]);
    }
  }
}

// tile[d][i] = scale * rows[i][d] for i in range, 0 beside it.
template <class Element, class T>
void load_transposed(T* __restrict tile, const Element* __restrict rows, int64_t stride, Range range, int dim,
                     T scale) {
  for_each_column<T>(
      range, {0, dim}, [=](int i, int d) { return to_compute(rows[i * stride + d]); },
      [=](int d, int i, Vector<T> x) { store<T>(tile + d * kTile + i, x * scale); });
}

// rows[i][d] = tile[i][d] for i in range.
template <class Element, class T>
void store_rows(Element* __restrict rows, int64_t stride, const T* __restrict tile, int width, Range range, int dim) {
  for (int i = range.begin; i < range.end; ++i) {
    Element* __restrict to = rows + i * stride;
    const T* __restrict from = tile + int64_t{i} * width;
    for (int d = 0; d < dim; ++d) from_compute(from[d], &to[d]);
  }
}

// ---- Products ---------------------------------------------------------------------------------------------------

// One block of c in registers: c[4][vectors] (+)= sum over k of a(row, k) * b[k][vectors]. a(row, k) lies at
// a[row * a_row + k * a_k].
template <class T, int kVectors, bool kAccumulate>
HF_FLASH_INLINE void multiply_block(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_row, T* c,
                                    int64_t c_row, int depth) {
  Vector<T> sum[kRegisterRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRegisterRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector<T>{};
  for (int k = 0; k < depth; ++k, a += a_k, b += b_row) {
    Vector<T> columns[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRegisterRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r * a_row] * columns[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRegisterRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* to = c + r * c_row + v * kLanes<T>;
      // c comes last: a tile's sum rounds with the size of the tile's terms, not with that of all tiles before it.
      store<T>(to, kAccumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
}

// How many vectors of a row of c are held in registers: AVX-512 has 32 registers, the others 16.
constexpr int kRegisterVectors = HF_FLASH_CPU_VECTOR_BYTES == 64 ? 4 : 2;

// c[rows][columns] (+)= a * b over `depth`; rows is a multiple of 4, columns of a vector's lanes.
template <class T, bool kAccumulate>
void multiply(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_row, T* c, int64_t c_row, Range rows,
              int columns, int depth) {
  constexpr int kWide = kRegisterVectors * kLanes<T>;
  int col = 0;
  for (; col + kWide <= columns; col += kWide)
    for (int r = rows.begin; r < rows.end; r += kRegisterRows)
      multiply_block<T, kRegisterVectors, kAccumulate>(a + r * a_row, a_row, a_k, b + col, b_row, c + r * c_row + col,
                                                       c_row, depth);
  for (; col < columns; col += kLanes<T>)
    for (int r = rows.begin; r < rows.end; r += kRegisterRows)
      multiply_block<T, 1, kAccumulate>(a + r * a_row, a_row, a_k, b + col, b_row, c + r * c_row + col, c_row, depth);
}

// c[key][query] = rows of keys times transposed queries, both over dim.
template <class T>
void multiply_keys_by_queries(const T* keys, int width, const T* queries, T* c, Range key_rows, int queries_end,
                              int dim) {
  multiply<T, false>(keys, width, 1, queries, kTile, c, kTile, key_rows, round_up(queries_end, kLanes<T>), dim);
}

// c[query][d] += sum over keys in `over` of scores[key][query] * rows[key][d].
template <class T>
void accumulate_over_keys(const T* scores, const T* rows, int width, T* c, Range queries, Range over) {
  multiply<T, true>(scores + int64_t{over.begin} * kTile, 1, kTile, rows + int64_t{over.begin} * width, width, c, width,
                    {round_down(queries.begin, kRegisterRows), round_up(queries.end, kRegisterRows)}, width,
                    over.end - over.begin);
}

// c[key][d] += sum over queries in `over` of scores[key][query] * rows[query][d].
template <class T>
void accumulate_over_queries(const T* scores, const T* rows, int width, T* c, Range keys, Range over) {
  multiply<T, true>(scores + over.begin, kTile, 1, rows + int64_t{over.begin} * width, width, c, width, keys, width,
                    over.end - over.begin);
}

}  // namespace
}  // namespace hf_flash::cpu::HF_FLASH_CPU_ISA
