"""csrc/sm90/backward_grid.h decides on the host, so it is compiled and asked here, without a GPU."""

import itertools
import os
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CXX = os.environ.get("CXX", "c++")
PROGRAM = """#include "sm90/backward_grid.h"
#include <cstdio>
#include <cstdlib>
int main(int, char** x) {
  hf_flash::AttentionParams p{};
  p.heads_q = 12;
  p.heads_k = 12 / std::atoi(x[8]);
  p.batch = 8;
  p.seqlen_q = std::atoi(x[1]);
  p.seqlen_k = std::atoi(x[2]);
  p.total_q = p.batch * p.seqlen_q;
  p.head_dim = p.head_dim_v = std::atoi(x[5]);
  p.window_left = -1;
  p.window_right = std::atoi(x[3]);
  p.deterministic = std::atoi(x[4]);
  p.scale = 1;
  p.dropout_keep = std::atoi(x[6]);
  int32_t range = 0;
  if (std::atoi(x[7])) p.key_range = &range;
  const hf_flash::sm90::BackwardGrid grid(p, std::atoi(x[5]), 132);
  if (std::atoi(x[9])) {
    std::printf("%d %d %d %d", grid.heads_first, grid.spreads, grid.reach, grid.divided.ctas > 0);
  } else {
    std::printf("%d %d %d %d %d %d %d %d %d", grid.ctas, grid.rotates, grid.finishes_dq, grid.stores_first,
                grid.spreads, grid.tall, grid.cluster, grid.team, grid.zeroes_ahead);
  }
}
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """grid(seqlen_q, seqlen_k, window_right, deterministic, head_dim, keep=256, ranges=False, group=1, order=False)
    on 132 SMs, batch 8, 12 heads of q.

    Returns ctas, rotates, finishes_dq, stores_first, spreads, tall, cluster, team, zeroes_ahead; or, with order,
    heads_first, spreads, reach and whether pieces of work are divided.
    """
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.cpp").write_text(PROGRAM)
    subprocess.run([CXX, "-std=c++17", f"-I{CSRC}", folder / "grid.cpp", "-o", folder / "grid"], check=True)

    def ask(*arguments, keep=256, ranges=False, group=1, order=False):
        words = [str(int(x)) for x in (*arguments, keep, ranges, group, order)]
        return tuple(map(int, subprocess.check_output([folder / "grid", *words], text=True).split()))

    return ask


def test_short_calls_finish_dq(grid):
    assert grid(512, 512, -1, False, 64, keep=230) == (132, 1, 1, 1, 1, 0, 0, 1, 0)
    assert grid(512, 513, -1, False, 64)[1:3] == (0, 0)  # too long for its waits
    assert grid(300, 512, -1, False, 64)[1:3] == (0, 0)  # four tiles of keys, three of queries: two would start at one
    assert grid(512, 512, 0, False, 64)[1:3] == (0, 0)  # a causal mask
    assert grid(128, 128, 0, False, 64)[1:3] == (1, 1)  # the same over a single tile of keys
    assert grid(512, 512, -1, False, 256)[1:3] == (0, 0)  # there all tiles add


def test_short_calls_hand_the_sums_on(grid):
    assert grid(512, 512, -1, False, 64) == (132, 0, 1, 0, 0, 0, 4, 1, 0)
    assert grid(300, 257, -1, True, 128) == (132, 0, 1, 0, 0, 0, 3, 1, 0)  # in whatever mode
    assert grid(512, 513, -1, False, 64)[6] == grid(512, 512, -1, False, 256)[6] == grid(512, 512, 0, False, 64)[6] == 0
    assert grid(128, 128, -1, False, 64)[6] == 0  # a single tile has nothing to hand on
    assert grid(200, 300, -1, False, 64)[6] == 0  # two tiles of queries
    assert [grid(s, s, -1, False, 64, keep=230)[6] for s in (256, 257)] == [2, 0]
    assert [grid(s, s, -1, False, 64, ranges=True)[6] for s in (256, 257)] == [2, 0]
    assert grid(256, 256, -1, False, 128, keep=230)[6] == 0


def test_zeros_that_dq_is_added_to(grid):
    """Short calls and a fixed order need none up to head dimension 128, long ones write them ahead."""

    def stores_spreads_zeroes(*arguments, **options):
        answer = grid(*arguments, **options)
        return answer[3], answer[4], answer[8]

    for head_dim, window_right in itertools.product((64, 128), (-1, 0)):
        assert stores_spreads_zeroes(600, 600, window_right, False, head_dim) == (0, 0, 1)
        assert stores_spreads_zeroes(4096, 4096, window_right, False, head_dim, keep=230) == (0, 0, 1)
    assert stores_spreads_zeroes(512, 512, 0, False, 64) == stores_spreads_zeroes(384, 384, 0, False, 128) == (1, 1, 0)
    assert stores_spreads_zeroes(20000, 20000, 0, True, 64) == (1, 0, 0)  # from the last query tile down
    assert stores_spreads_zeroes(2048, 2048, -1, True, 128) == (1, 1, 0)
    assert stores_spreads_zeroes(512, 512, -1, False, 64) == (0, 0, 0)  # from CTA to CTA
    for deterministic in (False, True):
        assert stores_spreads_zeroes(2048, 2048, 0, deterministic, 256) == (0, 0, 0)  # zeroed before


def test_a_fixed_order_has_whole_heads_at_once(grid):
    assert grid(2048, 2048, -1, True, 64)[:3] == (128, 1, 1)
    assert grid(2048, 2048, -1, True, 128)[:3] == (128, 1, 0)  # tall tiles gain more than finishing dq
    assert grid(2048, 2048, -1, True, 128, keep=230)[:3] == (128, 1, 1)
    assert grid(2048, 2048, -1, True, 256)[:3] == (128, 1, 0)
    assert grid(2048, 2048, 0, True, 128)[:3] == (132, 0, 0)
    assert grid(90, 9000, -1, True, 64)[1:3] == (0, 0)  # 71 tiles of keys would leave 61 SMs idle
    for seqlen, head_dim in itertools.product((100, 640, 1500, 4096, 20000), (64, 256)):
        ctas, rotates, finishes, _, spreads, *_ = grid(seqlen, seqlen, -1, True, head_dim)
        tiles = -(-seqlen // 128)
        assert not rotates or (ctas % tiles == 0 and spreads)
        assert rotates or not finishes


def test_long_calls_of_wide_heads_have_tall_query_tiles(grid):
    assert grid(1024, 1024, -1, False, 128)[5] == grid(512, 513, 0, True, 128)[5] == 1
    assert grid(1024, 1024, -1, False, 64)[5] == grid(1024, 1024, -1, False, 256)[5] == 0
    assert grid(512, 512, 0, False, 128)[5] == grid(511, 4096, -1, False, 128)[5] == 0
    assert grid(1024, 1024, -1, True, 128)[2:6:3] == (0, 1)
    assert grid(768, 768, -1, True, 128)[2:6:3] == (1, 0)  # dq is finished by the other kernel
    assert grid(1024, 1024, -1, True, 128, keep=230)[2:6:3] == (1, 0)
    assert grid(1024, 1024, -1, False, 128, keep=230)[5] == 0  # dropout has no such kernel


def test_two_ctas_share_the_keys_of_heads_over_128(grid):
    assert grid(2048, 2048, -1, False, 256)[7] == grid(90, 100, 0, True, 192)[7] == 2
    assert grid(2048, 2048, -1, False, 128)[7] == grid(2048, 2048, -1, False, 256, keep=230)[7] == 1
    assert grid(2048, 2048, -1, True, 256, keep=230)[:3] == (128, 1, 0)  # tiles of 64 keys, one a CTA
    assert grid(100, 65, 0, False, 256)[0] == 132
    assert grid(400, 300, -1, True, 256)[:2] == (132, 1)  # three tiles, and 22 heads at once
    assert grid(1200, 1100, -1, True, 256)[:2] == (126, 1)  # nine, and seven


def test_heads_that_share_one_of_k_stay_within_reach(grid):
    far = 2**31 - 1
    assert grid(2100, 2100, -1, False, 64, group=1, order=True) == (0, 0, far, 1)
    assert grid(2100, 2100, -1, False, 64, group=2, order=True) == (1, 0, far, 1)  # the L2 cache holds two heads
    assert grid(2100, 2100, -1, False, 64, group=12, order=True) == (1, 0, 40, 0)
    assert grid(2048, 2048, -1, False, 128, group=4, order=True) == (1, 0, 32, 0)
    assert grid(2048, 2048, -1, True, 128, group=4, order=True) == (1, 1, 32, 0)
    assert grid(512, 500, -1, False, 64, keep=230, group=4, order=True) == (1, 1, 13, 0)
    assert grid(1024, 1024, 0, False, 64, group=4, order=True)[:2] == (0, 0)  # a causal mask
    assert grid(1024, 1024, 0, True, 64, group=4, order=True)[:2] == (1, 0)
    assert [grid(s, s, -1, False, 128, group=4)[6] for s in (256, 257)] == [2, 0]
    assert grid(512, 512, -1, False, 128, group=2)[6] == 4


def test_nothing_to_do(grid):
    assert grid(512, 0, -1, True, 64)[:3] == (0, 0, 0)
