// How Hopper's backward spreads over the SMs, asked for twice a call: how large the workspace is depends on it too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/divided_work.h"
#include "params.h"
#include "sm90/config.h"
#include "sm90/terms.h"

namespace hf_flash::sm90 {

// So many CTAs of a cluster share a piece of work, whose keys are those of all.
inline int team_of(const AttentionParams& p, int head_dim) {
  return pairs_ctas(head_dim, p.drops(), p.has_extras()) ? 2 : 1;
}
inline int keys_of_work(const AttentionParams& p, int head_dim) {
  return team_of(p, head_dim) * backward_keys(head_dim);
}

struct BackwardGrid {
  int ctas;  // at once, each for one piece of work after the other
  int team;  // team_of()
  // Where all key tiles of a head see the same queries, or there is one alone, all of them start in the same round,
  // each at a query tile of its own, and take turns at dQ with next to no waiting.
  bool rotates;
  bool finishes_dq;     // so the order is fixed, and the last turn can write dq
  bool stores_first;    // the first to add to a query tile's dQ stores, and nobody has to zero it
  bool zeroes_ahead;    // or the CTAs zero it before they come to a head (zero_sums())
  bool spreads;         // the key tiles of a head start at steps apart from each other's
  int reach;            // the first and the last of them by so many steps at most; INT32_MAX: no limit
  bool heads_first;     // steps go through the heads of a group before the next query tile
  bool tall;            // query tiles of 80
  DividedWork divided;  // the last pieces of work, perhaps
  // The key tiles of a head are at work in the CTAs of a cluster of so many: sums of dQ go from one's shared memory to
  // the next one's, and the last CTA writes dq. 0: the sums are in global memory.
  int cluster;

  // head_dim: of the kernel.
  BackwardGrid(const AttentionParams& p, int head_dim, int multiprocessors) {
    team = team_of(p, head_dim);
    const int keys = keys_of_work(p, head_dim), tiles = (p.seqlen_k + keys - 1) / keys;
    ctas = static_cast<int>(std::min(int64_t{tiles} * p.batch * p.heads_k, int64_t{multiprocessors / team}));
    const bool all_see_all = tiles == 1 || (p.window_left < 0 && p.window_right < 0);
    cluster = all_see_all && relay_pays(p, head_dim, tiles) ? tiles : 0;
    // Not if whole heads left more than a third of the SMs idle.
    const bool side_by_side = all_see_all && tiles > 0 && tiles <= ctas && 3 * (ctas % tiles) <= ctas;
    const bool tall_pays = head_dim == 128 && !p.drops() && !p.has_extras() && p.seqlen_q >= kTallFromQueries &&
                           p.seqlen_k > kTallAboveKeys;
    const bool turns_pay = p.deterministic && !(tall_pays && p.seqlen_k > kTallTurnsAboveKeys);
    finishes_dq = relays() || (side_by_side && head_dim <= 128 && (turns_pay || finishing_pays(p, tiles)));
    rotates = !relays() && (finishes_dq || (side_by_side && p.deterministic));
    if (rotates || relays()) ctas -= ctas % tiles;
    tall = tall_pays && !finishes_dq;
    stores_first = !relays() && head_dim <= 128 && (p.deterministic || p.seqlen_k <= kStoredKeys);
    zeroes_ahead = !relays() && head_dim <= 128 && !stores_first;
    share_cache(p, head_dim, tiles, all_see_all);
    const bool unlimited = reach == INT32_MAX;  // a part of a piece of work starts anywhere
    const bool equal_steps = all_see_all && !p.ragged() && p.query_range == nullptr && unlimited;
    if (head_dim <= 128 && equal_steps && !p.deterministic && !finishes_dq) divide(p, tiles, head_dim);
    ctas *= team;
  }

  bool relays() const { return cluster > 0; }

 private:
  // In which order the key tiles of a head of k meet the queries of the heads of q that share it. Where each is at
  // another of all these steps, Q, dO and dQ of all have to lie in the L2 cache, and those of many heads do not: with 8
  // of them at D 128 each key tile read everything from memory, S 1024 to 8192 253 to 278 TFLOP/s, with 4 309 to 423.
  // Kept within reach of each other or together, and with no piece of work divided, 450 to 630 and 446 to 590. Under a
  // causal mask those that few queries see hurry ahead anyway: there all heads first loses 4 to 7 %, starting apart 4
  // to 13; but where the order of the additions is fixed all heads first gains 8 to 25.
  void share_cache(const AttentionParams& p, int head_dim, int tiles, bool all_see_all) {
    const int group = p.heads_q / p.heads_k, queries = head_dim > 128 ? 64 : queries_of(p, head_dim);
    heads_first = group > 1 && (all_see_all || p.deterministic);
    spreads = rotates || (stores_first && !p.deterministic && (group == 1 || all_see_all));
    reach = INT32_MAX;
    if (group == 1 || tiles == 0) return;
    const int64_t heads = (ctas + tiles - 1) / tiles, step_bytes = int64_t{8} * queries * head_dim;
    const int64_t steps = int64_t{group} * ((p.seqlen_q + queries - 1) / queries);
    const int64_t cached = kCachedBytes / std::max(heads * step_bytes, int64_t{1});
    if (cached < steps) reach = static_cast<int>(std::max(cached, int64_t{2} * tiles));
  }

  void divide(const AttentionParams& p, int tiles, int head_dim) {
    const int64_t works = int64_t{tiles} * p.batch * p.heads_k;
    if (p.seqlen_q < kDividedFromQueries || works <= ctas || works % ctas == 0 || works > INT32_MAX) return;
    DividedWork work;
    work.ctas = ctas;
    work.before = static_cast<int32_t>((works / ctas - 1) * ctas);
    work.pieces = static_cast<int32_t>(works - work.before);
    const int queries = queries_of(p, head_dim);
    work.steps = p.heads_q / p.heads_k * ((p.seqlen_q + queries - 1) / queries);
    work.tiles = tiles;
    work.heads = p.heads_k;
    if (work.fits(p, 2 * backward_keys(head_dim) * head_dim)) divided = work;
  }

  // A tile, up to D 128.
  int queries_of(const AttentionParams& p, int head_dim) const {
    // At D 128 with dropout the kernel of every term serves linear ones.
    static_assert(backward_config(128, Terms::kLinear).queries == backward_config(128, Terms::kEvery).queries);
    return tall ? kTallQueries : backward_config(head_dim, terms_of(p)).queries;
  }
  // With fewer query tiles than key tiles, CTAs would wait for each other.
  static bool has_query_tiles(const AttentionParams& p, int tiles) {
    return int64_t{p.seqlen_q + 127} / 128 * (p.heads_q / p.heads_k) >= tiles;
  }
  // Where the order of the additions is free.
  static bool finishing_pays(const AttentionParams& p, int tiles) {
    return p.seqlen_k <= kFinishedKeys && has_query_tiles(p, tiles);
  }
  static bool relay_pays(const AttentionParams& p, int head_dim, int tiles) {
    return tiles > 1 && p.seqlen_k <= relayed_keys(head_dim, p.drops(), p.ragged(), p.heads_q / p.heads_k) &&
           has_query_tiles(p, tiles) && !p.has_extras();
  }
};

}  // namespace hf_flash::sm90
