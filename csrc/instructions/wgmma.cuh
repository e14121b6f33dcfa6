// wgmma: D (64 x N, float32) = A (64 x 16) B (16 x N) + D, asynchronously, by a warpgroup. Warp w of it holds rows 16 w
// .. 16 w + 15 of D and of an A in registers, in the layouts of mma.m16n8k16 (mma.cuh). A and B in shared memory are
// named by the lower words of descriptors (tile/swizzled_tile.cuh).
#pragma once

#include <type_traits>

#include "instructions/element.cuh"

namespace hf_flash {

// Before the first wgmma, and whenever registers that it uses were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` committed groups are in flight.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// The next wait comes after what x is made of: ptxas moves arithmetic behind a wait, as it likes, but not a store. This
// one never happens, since no result of arithmetic is a NaN with all bits set. (ptxas knows that a sum of exponentials
// is not negative, so that this would be no question to ask.)
__device__ __forceinline__ void wgmma_wait_after(float x, uint32_t shared_address) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.eq.u32 p, %0, 0xFFFFFFFF;\n"
      "@p st.shared.u32 [%1], %0;\n}" ::"r"(__float_as_uint(x)),
      "r"(shared_address)
      : "memory");
}

// Keeps the compiler from reading or moving a register that a wgmma in flight writes.
__device__ __forceinline__ void wgmma_settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }
// What it holds does not count any more: a product that may add to it, but will not, need not keep it till then.
__device__ __forceinline__ void wgmma_forget(float& x) { asm volatile("" : "=f"(x)); }

// Operand names of the accumulators, and their constraints, in groups of eight.
#define HF_FLASH_D0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define HF_FLASH_D1 "%8,%9,%10,%11,%12,%13,%14,%15"
#define HF_FLASH_D2 "%16,%17,%18,%19,%20,%21,%22,%23"
#define HF_FLASH_D3 "%24,%25,%26,%27,%28,%29,%30,%31"
#define HF_FLASH_D4 "%32,%33,%34,%35,%36,%37,%38,%39"
#define HF_FLASH_D5 "%40,%41,%42,%43,%44,%45,%46,%47"
#define HF_FLASH_D6 "%48,%49,%50,%51,%52,%53,%54,%55"
#define HF_FLASH_D7 "%56,%57,%58,%59,%60,%61,%62,%63"
#define HF_FLASH_D8 "%64,%65,%66,%67,%68,%69,%70,%71"
#define HF_FLASH_D9 "%72,%73,%74,%75,%76,%77,%78,%79"
#define HF_FLASH_D10 "%80,%81,%82,%83,%84,%85,%86,%87"
#define HF_FLASH_D11 "%88,%89,%90,%91,%92,%93,%94,%95"
#define HF_FLASH_D12 "%96,%97,%98,%99,%100,%101,%102,%103"
#define HF_FLASH_D13 "%104,%105,%106,%107,%108,%109,%110,%111"
#define HF_FLASH_D14 "%112,%113,%114,%115,%116,%117,%118,%119"
#define HF_FLASH_D15 "%120,%121,%122,%123,%124,%125,%126,%127"
#define HF_FLASH_C8(i)                                                                                  \
  "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]), "+f"(d[(i) + 5]), \
      "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define HF_FLASH_NAMES_32 HF_FLASH_D0 "," HF_FLASH_D1
#define HF_FLASH_CONSTRAINTS_32 HF_FLASH_C8(0), HF_FLASH_C8(8)
#define HF_FLASH_NAMES_64 HF_FLASH_D0 "," HF_FLASH_D1 "," HF_FLASH_D2 "," HF_FLASH_D3
#define HF_FLASH_CONSTRAINTS_64 HF_FLASH_C8(0), HF_FLASH_C8(8), HF_FLASH_C8(16), HF_FLASH_C8(24)
#define HF_FLASH_NAMES_80 HF_FLASH_D0 "," HF_FLASH_D1 "," HF_FLASH_D2 "," HF_FLASH_D3 "," HF_FLASH_D4
#define HF_FLASH_CONSTRAINTS_80 HF_FLASH_C8(0), HF_FLASH_C8(8), HF_FLASH_C8(16), HF_FLASH_C8(24), HF_FLASH_C8(32)
#define HF_FLASH_NAMES_96 HF_FLASH_D0 "," HF_FLASH_D1 "," HF_FLASH_D2 "," HF_FLASH_D3 "," HF_FLASH_D4 "," HF_FLASH_D5
#define HF_FLASH_CONSTRAINTS_96 \
  HF_FLASH_C8(0), HF_FLASH_C8(8), HF_FLASH_C8(16), HF_FLASH_C8(24), HF_FLASH_C8(32), HF_FLASH_C8(40)
#define HF_FLASH_NAMES_112 \
  HF_FLASH_D0 "," HF_FLASH_D1 "," HF_FLASH_D2 "," HF_FLASH_D3 "," HF_FLASH_D4 "," HF_FLASH_D5 "," HF_FLASH_D6
#define HF_FLASH_CONSTRAINTS_112 \
  HF_FLASH_C8(0), HF_FLASH_C8(8), HF_FLASH_C8(16), HF_FLASH_C8(24), HF_FLASH_C8(32), HF_FLASH_C8(40), HF_FLASH_C8(48)
#define HF_FLASH_NAMES_128                                                                                    \
  HF_FLASH_D0 "," HF_FLASH_D1 "," HF_FLASH_D2 "," HF_FLASH_D3 "," HF_FLASH_D4 "," HF_FLASH_D5 "," HF_FLASH_D6 \
              "," HF_FLASH_D7
#define HF_FLASH_CONSTRAINTS_128                                                                                       \
  HF_FLASH_C8(0), HF_FLASH_C8(8), HF_FLASH_C8(16), HF_FLASH_C8(24), HF_FLASH_C8(32), HF_FLASH_C8(40), HF_FLASH_C8(48), \
      HF_FLASH_C8(56)
#define HF_FLASH_NAMES_144                                                                                    \
  HF_FLASH_D0 "," HF_FLASH_D1 "," HF_FLASH_D2 "," HF_FLASH_D3 "," HF_FLASH_D4 "," HF_FLASH_D5 "," HF_FLASH_D6 \
              "," HF_FLASH_D7 "," HF_FLASH_D8
#define HF_FLASH_CONSTRAINTS_144                                                                                       \
  HF_FLASH_C8(0), HF_FLASH_C8(8), HF_FLASH_C8(16), HF_FLASH_C8(24), HF_FLASH_C8(32), HF_FLASH_C8(40), HF_FLASH_C8(48), \
      HF_FLASH_C8(56), HF_FLASH_C8(64)
#define HF_FLASH_NAMES_160                                                                                    \
  HF_FLASH_D0 "," HF_FLASH_D1 "," HF_FLASH_D2 "," HF_FLASH_D3 "," HF_FLASH_D4 "," HF_FLASH_D5 "," HF_FLASH_D6 \
              "," HF_FLASH_D7 "," HF_FLASH_D8 "," HF_FLASH_D9
#define HF_FLASH_CONSTRAINTS_160                                                                                       \
  HF_FLASH_C8(0), HF_FLASH_C8(8), HF_FLASH_C8(16), HF_FLASH_C8(24), HF_FLASH_C8(32), HF_FLASH_C8(40), HF_FLASH_C8(48), \
      HF_FLASH_C8(56), HF_FLASH_C8(64), HF_FLASH_C8(72)
#define HF_FLASH_NAMES_176                                                                                    \
  HF_FLASH_D0 "," HF_FLASH_D1 "," HF_FLASH_D2 "," HF_FLASH_D3 "," HF_FLASH_D4 "," HF_FLASH_D5 "," HF_FLASH_D6 \
              "," HF_FLASH_D7 "," HF_FLASH_D8 "," HF_FLASH_D9 "," HF_FLASH_D10
#define HF_FLASH_CONSTRAINTS_176                                                                                       \
  HF_FLASH_C8(0), HF_FLASH_C8(8), HF_FLASH_C8(16), HF_FLASH_C8(24), HF_FLASH_C8(32), HF_FLASH_C8(40), HF_FLASH_C8(48), \
      HF_FLASH_C8(56), HF_FLASH_C8(64), HF_FLASH_C8(72), HF_FLASH_C8(80)
#define HF_FLASH_NAMES_192                                                                                    \
  HF_FLASH_D0 "," HF_FLASH_D1 "," HF_FLASH_D2 "," HF_FLASH_D3 "," HF_FLASH_D4 "," HF_FLASH_D5 "," HF_FLASH_D6 \
              "," HF_FLASH_D7 "," HF_FLASH_D8 "," HF_FLASH_D9 "," HF_FLASH_D10 "," HF_FLASH_D11
#define HF_FLASH_CONSTRAINTS_192                                                                                       \
  HF_FLASH_C8(0), HF_FLASH_C8(8), HF_FLASH_C8(16), HF_FLASH_C8(24), HF_FLASH_C8(32), HF_FLASH_C8(40), HF_FLASH_C8(48), \
      HF_FLASH_C8(56), HF_FLASH_C8(64), HF_FLASH_C8(72), HF_FLASH_C8(80), HF_FLASH_C8(88)
#define HF_FLASH_NAMES_256                                                                                       \
  HF_FLASH_D0 "," HF_FLASH_D1 "," HF_FLASH_D2 "," HF_FLASH_D3 "," HF_FLASH_D4 "," HF_FLASH_D5 "," HF_FLASH_D6    \
              "," HF_FLASH_D7 "," HF_FLASH_D8 "," HF_FLASH_D9 "," HF_FLASH_D10 "," HF_FLASH_D11 "," HF_FLASH_D12 \
              "," HF_FLASH_D13 "," HF_FLASH_D14 "," HF_FLASH_D15
#define HF_FLASH_CONSTRAINTS_256                                                                                       \
  HF_FLASH_C8(0), HF_FLASH_C8(8), HF_FLASH_C8(16), HF_FLASH_C8(24), HF_FLASH_C8(32), HF_FLASH_C8(40), HF_FLASH_C8(48), \
      HF_FLASH_C8(56), HF_FLASH_C8(64), HF_FLASH_C8(72), HF_FLASH_C8(80), HF_FLASH_C8(88), HF_FLASH_C8(96),            \
      HF_FLASH_C8(104), HF_FLASH_C8(112), HF_FLASH_C8(120)

// A descriptor's upper word: 128-byte swizzle, 1024 bytes between groups of eight rows. Only the lower one is computed
// with: as 64-bit numbers descriptors took half of the backward's instructions.
#define HF_FLASH_DESCRIPTOR(name, lower) "mov.b64 " name ", {%" #lower ", 0x40000040};\n"

// x, y, ...: the numbers of the operands after the accumulators.
#define HF_FLASH_WGMMA_SS(N, TYPE, x, y, z, ta, tb)                                                               \
  asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %" #z ", 0;\n" HF_FLASH_DESCRIPTOR("a", x)      \
                   HF_FLASH_DESCRIPTOR("b", y) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE    \
                                               " {" HF_FLASH_NAMES_##N "}, a, b, p, 1, 1, %" #ta ", %" #tb ";\n}" \
               : HF_FLASH_CONSTRAINTS_##N                                                                         \
               : "r"(a), "r"(b), "r"(static_cast<int>(accumulate)), "n"(TRANSPOSED_A), "n"(TRANSPOSED_B))
#define HF_FLASH_WGMMA_RS(N, TYPE, x0, x1, x2, x3, y, z, tb)                                                       \
  asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %" #z ", 0;\n" HF_FLASH_DESCRIPTOR(                 \
                   "b", y) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" HF_FLASH_NAMES_##N \
               "}, {%" #x0 ", %" #x1 ", %" #x2 ", %" #x3 "}, b, p, 1, 1, %" #tb ";\n}"                             \
               : HF_FLASH_CONSTRAINTS_##N                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(static_cast<int>(accumulate)),            \
                 "n"(TRANSPOSED_B))

// A and B in shared memory. TRANSPOSED: the operand's rows (A's 64, B's N) are contiguous, not its depth. accumulate =
// false ignores D's old value.
template <class T, int N, int TRANSPOSED_A, int TRANSPOSED_B>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint32_t a, uint32_t b, bool accumulate) {
  if constexpr (N == 32) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(32, "f16", 16, 17, 18, 19, 20);
    else
      HF_FLASH_WGMMA_SS(32, "bf16", 16, 17, 18, 19, 20);
  } else if constexpr (N == 64) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(64, "f16", 32, 33, 34, 35, 36);
    else
      HF_FLASH_WGMMA_SS(64, "bf16", 32, 33, 34, 35, 36);
  } else if constexpr (N == 80) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(80, "f16", 40, 41, 42, 43, 44);
    else
      HF_FLASH_WGMMA_SS(80, "bf16", 40, 41, 42, 43, 44);
  } else if constexpr (N == 96) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(96, "f16", 48, 49, 50, 51, 52);
    else
      HF_FLASH_WGMMA_SS(96, "bf16", 48, 49, 50, 51, 52);
  } else if constexpr (N == 112) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(112, "f16", 56, 57, 58, 59, 60);
    else
      HF_FLASH_WGMMA_SS(112, "bf16", 56, 57, 58, 59, 60);
  } else if constexpr (N == 128) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(128, "f16", 64, 65, 66, 67, 68);
    else
      HF_FLASH_WGMMA_SS(128, "bf16", 64, 65, 66, 67, 68);
  } else if constexpr (N == 144) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(144, "f16", 72, 73, 74, 75, 76);
    else
      HF_FLASH_WGMMA_SS(144, "bf16", 72, 73, 74, 75, 76);
  } else if constexpr (N == 160) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(160, "f16", 80, 81, 82, 83, 84);
    else
      HF_FLASH_WGMMA_SS(160, "bf16", 80, 81, 82, 83, 84);
  } else if constexpr (N == 176) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(176, "f16", 88, 89, 90, 91, 92);
    else
      HF_FLASH_WGMMA_SS(176, "bf16", 88, 89, 90, 91, 92);
  } else if constexpr (N == 192) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(192, "f16", 96, 97, 98, 99, 100);
    else
      HF_FLASH_WGMMA_SS(192, "bf16", 96, 97, 98, 99, 100);
  } else if constexpr (N == 256) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_SS(256, "f16", 128, 129, 130, 131, 132);
    else
      HF_FLASH_WGMMA_SS(256, "bf16", 128, 129, 130, 131, 132);
  } else {
    static_assert(N == 0, "add this width to the lists above");
  }
}

// A in registers. They may be written again only after wgmma_wait.
template <class T, int N, int TRANSPOSED_B>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b, bool accumulate) {
  if constexpr (N == 32) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(32, "f16", 16, 17, 18, 19, 20, 21, 22);
    else
      HF_FLASH_WGMMA_RS(32, "bf16", 16, 17, 18, 19, 20, 21, 22);
  } else if constexpr (N == 64) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(64, "f16", 32, 33, 34, 35, 36, 37, 38);
    else
      HF_FLASH_WGMMA_RS(64, "bf16", 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (N == 80) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(80, "f16", 40, 41, 42, 43, 44, 45, 46);
    else
      HF_FLASH_WGMMA_RS(80, "bf16", 40, 41, 42, 43, 44, 45, 46);
  } else if constexpr (N == 96) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(96, "f16", 48, 49, 50, 51, 52, 53, 54);
    else
      HF_FLASH_WGMMA_RS(96, "bf16", 48, 49, 50, 51, 52, 53, 54);
  } else if constexpr (N == 112) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(112, "f16", 56, 57, 58, 59, 60, 61, 62);
    else
      HF_FLASH_WGMMA_RS(112, "bf16", 56, 57, 58, 59, 60, 61, 62);
  } else if constexpr (N == 128) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(128, "f16", 64, 65, 66, 67, 68, 69, 70);
    else
      HF_FLASH_WGMMA_RS(128, "bf16", 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (N == 144) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(144, "f16", 72, 73, 74, 75, 76, 77, 78);
    else
      HF_FLASH_WGMMA_RS(144, "bf16", 72, 73, 74, 75, 76, 77, 78);
  } else if constexpr (N == 160) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(160, "f16", 80, 81, 82, 83, 84, 85, 86);
    else
      HF_FLASH_WGMMA_RS(160, "bf16", 80, 81, 82, 83, 84, 85, 86);
  } else if constexpr (N == 176) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(176, "f16", 88, 89, 90, 91, 92, 93, 94);
    else
      HF_FLASH_WGMMA_RS(176, "bf16", 88, 89, 90, 91, 92, 93, 94);
  } else if constexpr (N == 192) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(192, "f16", 96, 97, 98, 99, 100, 101, 102);
    else
      HF_FLASH_WGMMA_RS(192, "bf16", 96, 97, 98, 99, 100, 101, 102);
  } else if constexpr (N == 256) {
    if constexpr (std::is_same_v<T, Half>)
      HF_FLASH_WGMMA_RS(256, "f16", 128, 129, 130, 131, 132, 133, 134);
    else
      HF_FLASH_WGMMA_RS(256, "bf16", 128, 129, 130, 131, 132, 133, 134);
  } else {
    static_assert(N == 0, "add this width to the lists above");
  }
}

#undef HF_FLASH_WGMMA_SS
#undef HF_FLASH_WGMMA_RS
#undef HF_FLASH_DESCRIPTOR

}  // namespace hf_flash
