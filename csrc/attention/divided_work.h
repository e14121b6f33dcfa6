// The last pieces of work of a kernel whose CTAs stay, where all pieces have as many steps: instead of a last round in
// which most CTAs idle, all of them get as many steps of what is left. A share may begin inside one piece and end
// inside another; none is smaller than a piece, so two CTAs share one at most, and who has its later steps gives the
// sums of these to the other. That one adds them in a fixed order: the same bits each time.
//
// The memory for it is dq, which nobody else uses before it is written behind the kernel. The kernel before lays it
// out.
#pragma once

#include <cstdint>

#include "attention/platform.h"
#include "params.h"

namespace hf_flash {

struct DividedWork {
  static constexpr int kMaxCtas = 256;
  static constexpr int kMaxParts = 4;  // of a CTA's share: two inside a piece, a whole one between them, the end

  struct alignas(32) Part {
    int32_t tile, head, batch;  // tile -1: there is no more
    int32_t first, count;       // steps
    int32_t gives, takes;       // place of the sums, or -1
  };
  struct Memory {
    int32_t given[kMaxCtas];  // of each place: so many warps have
    Part parts[kMaxCtas][kMaxParts];
    float sums[1];  // place after place
  };

  int32_t ctas = 0;    // 0: nothing is divided
  int32_t before = 0;  // so many pieces of work come first
  int32_t pieces = 0;  // as many as CTAs at least, less than twice as many
  int32_t steps = 0;   // of each
  int32_t tiles = 0;   // of a sequence and head
  int32_t heads = 0;

  HF_FLASH_HOST_DEVICE static Memory& memory(const AttentionParams& p) { return *static_cast<Memory*>(p.dq.data); }
  // Has dq room for it? sums: float32 numbers a place.
  bool fits(const AttentionParams& p, int64_t sums) const {
    const int64_t bytes = static_cast<int64_t>(sizeof(Memory)) + 4 * ctas * sums;
    return ctas <= kMaxCtas && bytes <= p.total_q * p.heads_q * int64_t{p.head_dim} * 2;
  }

#ifdef __CUDACC__
  // By a CTA of the kernel before.
  __device__ void lay_out(const AttentionParams& p) const {
    Memory& to = memory(p);
    const int64_t all = int64_t{pieces} * steps;
    for (int cta = threadIdx.x; cta < ctas; cta += blockDim.x) {
      to.given[cta] = 0;
      // From the last CTA on: who takes waits for one with a lower number, which runs if anybody does, and which gives
      // before it takes.
      const int share = ctas - 1 - cta;
      int64_t from = all * share / ctas;
      const int64_t end = all * (share + 1) / ctas;
      for (int n = 0; n < kMaxParts; ++n) {
        const int64_t piece = from / steps, index = before + piece, until = min(end, (piece + 1) * steps);
        Part part{-1, 0, 0, 0, 0, -1, -1};
        if (from < end) {
          part.tile = static_cast<int32_t>(index % tiles);
          part.head = static_cast<int32_t>(index / tiles % heads);
          part.batch = static_cast<int32_t>(index / tiles / heads);
          part.first = static_cast<int32_t>(from - piece * steps);
          part.count = static_cast<int32_t>(until - from);
          if (part.first > 0) part.gives = share - 1;
          if (part.first == 0 && part.count < steps) part.takes = share;
          from = until;
        }
        to.parts[cta][n] = part;
      }
    }
  }
#endif
};

}  // namespace hf_flash
