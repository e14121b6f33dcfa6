// Which tile of which head of which sequence a CTA works on. All tiles of one head lie side by side, so that its K and
// V (or Q and dO) stay in the L2 cache.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace hf_flash {

struct TileSchedule {
  int32_t tiles;  // tiles of the longest sequence
  int32_t heads;
  int32_t batch;
  int32_t first_batch = 0;  // the grid's z dimension ends at 65535; larger batches take several launches

  static constexpr int kMaxBatch = 65535;

  dim3 grid() const { return dim3(tiles, heads, batch - first_batch < kMaxBatch ? batch - first_batch : kMaxBatch); }

  struct Work {
    int tile, head, batch;
  };

  // This CTA's work. reverse: last tile first. A causal head's last query tile sees the most keys, and what takes
  // longest should start first.
  __device__ Work work(bool reverse) const {
    const int tile = blockIdx.x;
    return {reverse ? tiles - 1 - tile : tile, static_cast<int>(blockIdx.y),
            first_batch + static_cast<int>(blockIdx.z)};
  }
};

// For kernels whose CTAs stay and take one tile after the other, in an order fixed beforehand. Where all tiles take
// about as long, those of one head lie side by side. Where later tiles take longer (a causal mask), heads come in
// sections whose keys fit the L2 cache together, or of few heads, the last tiles of all heads of a section first. A
// section begins with a round of its own, and each round over the CTAs runs in the other direction than the one before:
// so every CTA gets as much, but for those with one tile for two of the others, since the places at the end of a
// section stay empty. Every two rounds these are others: the busiest of 132 CTAs had 3 to 6 % more steps than the mean
// at S 512 to 2048 and 1.5 at 16384, and has 0 to 1, at D 128 and S 1024 3. Not where that parts two rounds of a
// section that level each other out: with three of them the busiest had 14 % more, and has 3.
struct PersistentSchedule {
  int32_t tiles;                  // tiles of the longest sequence
  int32_t heads;                  // a sequence
  int32_t planes;                 // batch * heads
  int32_t section = 0;            // planes a section; 0: tiles take about as long
  int32_t rounds = 0;             // a section
  int32_t shift = 0;              // so many CTAs further every two rounds
  bool first_is_longest = false;  // of the tiles of a head, instead of the last
  bool by_head = false;  // sequences lie side by side, not heads: those that share a bias read it at the same time
  // Each sequence has tiles of its own, which are listed, one sequence after the other: where the places of tiles that
  // do not exist were dealt out too, some CTAs got a fifth more than others.
  bool listed = false;
  int32_t side = 1;  // so many neighbouring CTAs stay in the order of their numbers, each with a tile of the same head
  bool by_tile = false;  // of those of a sequence the longest first, all heads side by side; or head after head
  int32_t divided_round = INT32_MAX;  // from this round on, pieces of work are divided (attention/divided_work.h)

  int64_t works() const { return int64_t{tiles} * planes; }

  // How many planes fill rounds of CTAs, or nearly: the first such number from `least` on, below `most`.
  int64_t planes_that_fill(int64_t least, int64_t most, int32_t ctas) const {
    for (int64_t width = std::max<int64_t>(least, 1); width < most; ++width) {
      const int64_t places = (width * tiles + ctas - 1) / ctas * ctas;
      if (20 * width * tiles >= 19 * places) return width;
    }
    return std::max<int64_t>({least, most, 1});
  }
  // widest: planes that a section may have; ctas: as many as run at once.
  void sort_by_length(int64_t widest, int32_t ctas) {
    const int64_t sections = (planes + widest - 1) / widest;
    section = static_cast<int32_t>((planes + sections - 1) / sections);
    rounds = (section * tiles + ctas - 1) / ctas;
    const bool in_pairs = rounds == 1 || rounds % 2 == 0;
    if (sections > 1 && in_pairs) shift = std::min(16, rounds * ctas - section * tiles) / side * side;
  }

  struct Work {
    int tile, head, batch;  // tile = -1: there is no more; tile >= tiles: nothing in this round
  };

  // This CTA's work of a round. team: so many neighbouring CTAs share it, and count as one.
  __device__ Work work(int round, int team = 1) const {
    const int ctas = gridDim.x / team, number = (blockIdx.x / team + round / 2 * shift) % ctas, own = number % side;
    const int cta = round % 2 ? ctas - side - (number - own) + own : number;
    const int batch = planes / heads;
    int tile, plane;
    if (section == 0) {
      const uint32_t index = round * ctas + cta;
      plane = index / tiles;
      tile = index % tiles;
      if (plane >= planes) return {-1, 0, 0};
      if (by_head) {
        const uint32_t row_tile = index / batch;  // of all heads
        return {static_cast<int>(row_tile % tiles), static_cast<int>(row_tile / tiles),
                static_cast<int>(index % batch)};
      }
    } else {
      const int first = round / rounds * section;
      if (first >= planes) return {-1, 0, 0};
      const int index = round % rounds * ctas + cta, width = min(section, planes - first);
      plane = first + index % width;
      const int rank = index / width;
      tile = rank >= tiles || first_is_longest ? rank : tiles - 1 - rank;
    }
    if (by_head) return {tile, plane / batch, plane % batch};
    return {tile, plane % heads, plane / heads};
  }

  struct Span {
    int first, count;
  };

  // Where in the list the last piece of work was: the next one of this CTA lies behind it.
  struct ListWalk {
    int first = 0;   // of 32 sequences
    int before = 0;  // tiles of those before them
  };

  // The same where tiles are listed, by a warp, round after round. spans(b): the tiles of sequence b.
  template <class SpansOf>
  __device__ Work listed_work(int round, ListWalk& walk, SpansOf spans, int team = 1) const {
    const int number = blockIdx.x / team, ctas = gridDim.x / team, cta = round % 2 ? ctas - 1 - number : number;
    const int batch = planes / heads, lane = threadIdx.x % 32, place = round * ctas + cta;
    for (; walk.first < batch; walk.first += 32) {
      const int b = walk.first + lane;
      const Span own = b < batch ? spans(b) : Span{0, 0};
      int end = own.count * heads;
      for (int step = 1; step < 32; step *= 2) {
        const int others = __shfl_up_sync(0xffffffffu, end, step);
        if (lane >= step) end += others;
      }
      end += walk.before;
      const uint32_t beyond = __ballot_sync(0xffffffffu, place < end);
      if (beyond == 0) {
        walk.before = __shfl_sync(0xffffffffu, end, 31);
        continue;
      }
      const int its = __ffs(beyond) - 1, count = __shfl_sync(0xffffffffu, own.count, its);
      const int own_place = place - __shfl_sync(0xffffffffu, end, its) + count * heads;
      const int rank = by_tile ? own_place / heads : own_place % count;
      const int tile = by_tile && !first_is_longest ? count - 1 - rank : rank;
      return {__shfl_sync(0xffffffffu, own.first, its) + tile, by_tile ? own_place % heads : own_place / count,
              walk.first + its};
    }
    return {-1, 0, 0};
  }
};

}  // namespace hf_flash
