"""csrc/attention/key_head_parts.h decides on the host, so it is compiled and asked here, without a GPU."""

import os
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CXX = os.environ.get("CXX", "c++")
PROGRAM = """#include "sm90/backward_grid.h"
#include "attention/key_head_parts.h"
#include <cstdio>
#include <cstdlib>
int main(int, char** x) {
  const auto number = [&](int n) { return std::atoi(x[n]); };
  hf_flash::AttentionParams p{};
  p.batch = number(1), p.seqlen_q = number(2), p.seqlen_k = number(3), p.heads_q = number(4), p.heads_k = number(5);
  p.head_dim = p.head_dim_v = number(6);
  p.total_q = p.batch * p.seqlen_q, p.total_k = p.batch * p.seqlen_k;
  p.window_left = number(8), p.window_right = number(7) ? 0 : number(9);
  p.deterministic = number(10);
  p.dropout_keep = number(11);
  p.scale = 1;
  using namespace hf_flash;
  const int parts = key_head_parts(p, sm90::keys_of_work(p, p.head_dim), 132 / sm90::team_of(p, p.head_dim));
  const sm90::BackwardGrid grid(p, p.head_dim, 132);
  std::printf("%d %d %d %d", parts, grid.reach, grid.finishes_dq, grid.stores_first);
}
"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, ...) on 132 SMs.

    Returns the parts, and of the whole call reach, finishes_dq and stores_first.
    """
    folder = tmp_path_factory.mktemp("parts")
    (folder / "parts.cpp").write_text(PROGRAM)
    subprocess.run([CXX, "-std=c++17", f"-I{CSRC}", folder / "parts.cpp", "-o", folder / "parts"], check=True)

    def run(*shape, causal=False, window=(-1, -1), deterministic=False, keep=256):
        words = [str(int(x)) for x in (*shape, causal, *window, deterministic, keep)]
        return tuple(map(int, subprocess.check_output([folder / "parts", *words], text=True).split()))

    return run


def test_few_key_tiles_are_split(ask):
    assert ask(1, 4096, 4096, 28, 4, 128, causal=True)[0] == 7  # 128 of them, the longest takes twice the mean
    assert ask(1, 4096, 4096, 16, 1, 64)[0] in (4, 8)  # 32 of them
    assert ask(4, 2048, 2048, 71, 1, 64, causal=True)[0] == 71  # a prime number of heads
    assert ask(1, 4096, 4096, 16, 1, 256, causal=True)[0] in (4, 8)
    assert ask(8, 2048, 2048, 16, 2, 128, causal=True)[0] in (2, 4)  # eight heads would hurry ahead
    assert ask(1, 32768, 32768, 64, 8, 128, causal=True)[0] == 2  # twice as many take twice the memory for nothing


def test_many_key_tiles_are_not(ask):
    assert ask(1, 8192, 8192, 32, 8, 128, causal=True)[0] == ask(4, 2048, 2048, 32, 8, 128)[0] == 1
    assert ask(8, 2048, 2048, 16, 2, 128)[0] == ask(1, 8192, 8192, 8, 4, 256, causal=True)[0] == 1
    assert ask(1, 4096, 4096, 28, 4, 128)[0] == 1  # 128 tiles of one length fill 132 SMs


def test_calls_under_the_sanitizers_are_split(ask):
    """tests/gpu/sanitized_calls.py"""
    assert ask(2, 140, 270, 6, 1, 64, causal=True)[0] > 1 and ask(2, 70, 90, 6, 1, 128)[0] > 1


def test_nothing_to_split(ask):
    assert ask(1, 128, 128, 12, 12, 64)[0] == ask(1, 0, 128, 12, 1, 64)[0] == ask(1, 128, 0, 12, 1, 64)[0] == 1
    assert ask(0, 128, 128, 12, 1, 64)[0] == 1


def test_parts_divide_the_heads(ask):
    for group in range(2, 33):
        for causal in (False, True):
            assert group % ask(1, 700, 700, group, 1, 64, causal=causal)[0] == 0


def test_a_narrow_window_is_hardly_worth_the_second_sum(ask):
    wide, narrow = ((ask(1, 8192, 8192, 8, 1, 128, window=(w, w))[0]) for w in (4096, 16))
    assert narrow <= wide


@pytest.mark.parametrize("head_dim, group", [(64, 8), (128, 8), (128, 5), (256, 7)])
def test_shapes_of_the_gpu_tests_stay_whole(ask, head_dim, group):
    """tests/gpu/test_grouped_heads.py asks for these, and for some that are split."""
    for batch, seqlen_q, seqlen_k, heads_k in ((11, 300, 400, 3), (7, 450, 700, 3), (8, 520, 1000, 2)):
        for deterministic in (False, True):
            shape = (batch, seqlen_q, seqlen_k, group * heads_k, heads_k, head_dim)
            parts, reach, *_ = ask(*shape, deterministic=deterministic)
            assert parts == 1 and reach < group * -(-seqlen_q // 128)
    assert ask(1, 700, 4200, group * 4, 4, head_dim)[0] == 1
    for batch, seqlen_q, seqlen_k, heads, heads_k in (
        (1, 300, 1100, 12, 1),
        (2, 650, 777, 14, 2),
        (3, 200, 260, 17, 1),
    ):
        assert ask(batch, seqlen_q, seqlen_k, heads, heads_k, head_dim, causal=True)[0] > 1
