"""csrc/attention/schedule.cuh deals out pieces of work by number alone, so it is compiled and asked without a GPU."""

import itertools
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CXX = os.environ.get("CXX", "c++")

RUNTIME = """#pragma once
#define __device__
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 blockIdx, gridDim, threadIdx;
inline int min(int a, int b) { return a < b ? a : b; }
// Of warps, which the order by numbers does without.
int __shfl_up_sync(unsigned, int, int);
int __shfl_sync(unsigned, int, int);
unsigned __ballot_sync(unsigned, bool);
int __ffs(unsigned);
"""

PROGRAM = """#include "attention/schedule.cuh"
#include <cstdio>
#include <cstdlib>
int main(int, char** x) {
  const auto number = [&](int n) { return std::atoi(x[n]); };
  const int tiles = number(1), heads = number(2), batch = number(3), ctas = number(4), team = number(5);
  hf_flash::PersistentSchedule schedule{tiles, heads, heads * batch};
  schedule.by_head = number(7);
  schedule.first_is_longest = number(8);
  schedule.side = number(9);
  if (number(6) > 0) schedule.sort_by_length(number(6), ctas / team);
  gridDim.x = ctas;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (int round = 0;; ++round) {
      const auto work = schedule.work(round, team);
      if (work.tile < 0) break;
      if (work.tile < tiles) std::printf("%u %d %d %d\\n", blockIdx.x, work.tile, work.head, work.batch);
    }
  }
}
"""


@pytest.fixture(scope="module")
def deal(tmp_path_factory):
    """deal(tiles, heads, batch, ctas, team=1, widest=0, by_head=False, first_is_longest=False, side=1).

    Returns what each CTA does: a list of (tile, head, batch) for each.
    """
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    (folder / "schedule.cpp").write_text(PROGRAM)
    command = [CXX, "-std=c++17", "-O1", f"-I{folder}", f"-I{CSRC}", folder / "schedule.cpp", "-o", folder / "schedule"]
    subprocess.run(command, check=True)

    def ask(tiles, heads, batch, ctas, team=1, widest=0, by_head=False, first_is_longest=False, side=1):
        words = [tiles, heads, batch, ctas, team, widest, by_head, first_is_longest, side]
        said = subprocess.check_output([folder / "schedule", *(str(int(x)) for x in words)], text=True)
        work = [[] for _ in range(ctas)]
        for line in said.splitlines():
            cta, *piece = map(int, line.split())
            work[cta].append(tuple(piece))
        return work

    return ask


@pytest.mark.parametrize("team", [1, 2])
@pytest.mark.parametrize("widest", [0, 3, 8])
def test_every_piece_of_work_is_done_once(deal, widest, team):
    for tiles, (heads, batch), ctas, flag in itertools.product((1, 5, 16), ((1, 1), (12, 3)), (2, 10, 132), (0, 1)):
        work = deal(tiles, heads, batch, ctas, team, widest, by_head=flag and not widest, first_is_longest=flag)
        everything = Counter(dict.fromkeys(itertools.product(range(tiles), range(heads), range(batch)), team))
        assert sum(map(Counter, work), Counter()) == everything
        assert widest or max(map(len, work)) - min(map(len, work)) <= 1


def test_a_team_does_the_same_in_the_same_order(deal):
    for widest in (0, 8):
        work = deal(16, 12, 4, 132, team=2, widest=widest, first_is_longest=True)
        assert work[0::2] == work[1::2]
        assert all(work)


def test_neighbours_have_tiles_of_one_head(deal):
    work = deal(4, 12, 8, 132, side=4)
    for first in range(0, 132, 4):
        for pieces in zip(*work[first : first + 4], strict=True):
            assert [piece[0] for piece in pieces] == [0, 1, 2, 3]
            assert len({piece[1:] for piece in pieces}) == 1


def test_long_tiles_are_shared_out_where_rounds_have_empty_places(deal):
    """128 tiles a section on 132 CTAs: always the same ones with no place in a round would have the longest alone."""
    for tiles, heads, widest in ((128, 16, 1), (16, 128, 8), (8, 256, 16), (4, 512, 64)):
        work = deal(tiles, heads, 1, 132, widest=widest, first_is_longest=True)
        length = [sum(1.6 * (tiles - tile) + 1 for tile, *_ in pieces) for pieces in work]
        assert max(length) <= 1.035 * sum(length) / 132


def test_rounds_that_level_each_other_out_stay_together(deal):
    """Sections of three rounds: the empty places may not change between the second and the third."""
    for tiles, heads, widest in ((12, 48, 24), (12, 96, 24), (32, 24, 12)):
        work = deal(tiles, heads, 1, 132, widest=widest, first_is_longest=True)
        length = [sum(1.6 * (tiles - tile) + 1 for tile, *_ in pieces) for pieces in work]
        assert max(length) <= 1.05 * sum(length) / 132


def test_the_longest_come_first(deal):
    for first_is_longest in (False, True):
        work = deal(8, 4, 1, 16, widest=4, first_is_longest=first_is_longest)
        length = {tile: 8 - tile if first_is_longest else 1 + tile for tile in range(8)}
        assert all(length[a[0]] >= length[b[0]] for pieces in work for a, b in itertools.pairwise(pieces))
        assert {sum(length[tile] for tile, *_ in pieces) for pieces in work} == {9}  # the next round runs backwards
