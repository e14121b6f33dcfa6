// Vectors of this instruction set's width, through the compiler's vector extension (gcc and clang, any CPU), and the
// functions of softmax on them.
#pragma once

#include "cpu/before_kernels.h"

namespace hf_flash::cpu::HF_FLASH_CPU_ISA {
namespace {

#define HF_FLASH_INLINE inline __attribute__((always_inline))

template <class T>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(HF_FLASH_CPU_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(HF_FLASH_CPU_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(HF_FLASH_CPU_VECTOR_BYTES)));
};

template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(HF_FLASH_CPU_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(HF_FLASH_CPU_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(HF_FLASH_CPU_VECTOR_BYTES)));
};

template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using IntVector = typename VectorOf<T>::integer;
template <class T>
constexpr int kLanes = HF_FLASH_CPU_VECTOR_BYTES / sizeof(T);

template <class T>
HF_FLASH_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}

template <class T>
HF_FLASH_INLINE void store(T* to, Vector<T> x) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = x;
}

template <class T>
HF_FLASH_INLINE Vector<T> splat(T x) {
  return x - Vector<T>{};
}

template <class T>
HF_FLASH_INLINE Vector<T> max(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// The transpose of a square of vectors: blocks of 1, 2, 4, ... lanes change places between rows that far apart.
template <class T, int kBlock, int... kLane>
HF_FLASH_INLINE void exchange_blocks(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const Vector<T> first = a, second = b;
#if defined(__clang__)
  a = __builtin_shufflevector(first, second, (kLane & kBlock ? kCount + kLane - kBlock : kLane)...);
  b = __builtin_shufflevector(first, second, (kLane & kBlock ? kCount + kLane : kLane + kBlock)...);
#else
  a = __builtin_shuffle(first, second, IntVector<T>{(kLane & kBlock ? kCount + kLane - kBlock : kLane)...});
  b = __builtin_shuffle(first, second, IntVector<T>{(kLane & kBlock ? kCount + kLane : kLane + kBlock)...});
#endif
}

template <class T, int kBlock = 1>
HF_FLASH_INLINE void transpose(Vector<T> (&rows)[kLanes<T>]) {
  if constexpr (kBlock < kLanes<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes<T>; ++r)
      if ((r & kBlock) == 0)
        exchange_blocks<T, kBlock>(rows[r], rows[r + kBlock], std::make_integer_sequence<int, kLanes<T>>{});
    transpose<T, 2 * kBlock>(rows);
  }
}

// Products of the low 32 bits of each 64-bit lane. Compilers do not see that one instruction does this.
typedef uint64_t WideVector __attribute__((vector_size(HF_FLASH_CPU_VECTOR_BYTES)));

HF_FLASH_INLINE WideVector multiply_low_halves(WideVector a, uint32_t b) {
  const WideVector other = WideVector{} + b;
#if defined(__x86_64__) && HF_FLASH_CPU_VECTOR_BYTES == 64
  return (WideVector)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)other);  // gcc 12 warns about the unmasked one
#elif defined(__x86_64__) && HF_FLASH_CPU_VECTOR_BYTES == 32
  return (WideVector)_mm256_mul_epu32((__m256i)a, (__m256i)other);
#elif defined(__x86_64__)
  return (WideVector)_mm_mul_epu32((__m128i)a, (__m128i)other);
#else
  return (a & 0xFFFFFFFFu) * other;
#endif
}

constexpr float kInfinity = __builtin_inff();

// exp(r) = 1 + r + r^2 polynomial(r) for |r| <= log(2) / 2: Chebyshev interpolation of (exp(r) - 1 - r) / r^2, with
// relative errors of exp below 1.2e-8 (float) and 1.8e-17 (double). log(2) is split so that n * high is exact.
template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kPolynomial[] = {1.3926183587713495e-3f, 8.363179052722577e-3f, 4.1666554617204574e-2f,
                                          0.16666576988697757f, 0.5f};
  static constexpr float kLog2High = 0.693145751953125f, kLog2Low = 1.42860682030941723212e-6f;
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the low bits of the sum
  static constexpr float kLowest = -87.0f;    // below, exp is 0: less than 1e-37 of the row's largest
  static constexpr int kBias = 127, kMantissa = 23;
};

template <>
struct ExpConstants<double> {
  static constexpr double kPolynomial[] = {
      2.5100385495510319e-8, 2.7620088445409748e-7, 2.7557268459997065e-6, 2.4801521295954375e-5, 1.9841269863053617e-4,
      1.3888888917213717e-3, 8.333333333330062e-3,  4.1666666666624127e-2, 0.16666666666666667,   0.50000000000000010};
  static constexpr double kLog2High = 6.93147180369123816490e-1, kLog2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLowest = -708.0;
  static constexpr int kBias = 1023, kMantissa = 52;
};

// x = n log(2) + r; exp(x) = power * (1 + tail), power = 2^n.
template <class T>
struct ExpParts {
  Vector<T> power, tail;
};

template <class T>
HF_FLASH_INLINE ExpParts<T> exp_parts(Vector<T> x) {
  using C = ExpConstants<T>;
  const Vector<T> shifted = x * T(1.44269504088896340736) + C::kRound;
  const Vector<T> n = shifted - C::kRound;
  const Vector<T> r = (x - n * C::kLog2High) - n * C::kLog2Low;
  Vector<T> polynomial = splat<T>(C::kPolynomial[0]);
#pragma GCC unroll 16
  for (unsigned c = 1; c < sizeof(C::kPolynomial) / sizeof(T); ++c) polynomial = polynomial * r + C::kPolynomial[c];
  const Vector<T> tail = polynomial * (r * r) + r;
  const IntVector<T> exponent = (IntVector<T>)shifted + C::kBias;  // the magic number's own bits shift out
  return {(Vector<T>)(exponent << C::kMantissa), tail};
}

// For x below about 88 (float) or 709 (double); exp(-inf) = 0, NaN stays NaN. Error about 1 ulp.
template <class T>
HF_FLASH_INLINE Vector<T> exp(Vector<T> x) {
  const ExpParts<T> e = exp_parts<T>(x);
  const Vector<T> value = e.power * e.tail + e.power;
  return x < ExpConstants<T>::kLowest ? Vector<T>{} : value;
}

// tanh(|x|) = (e - 1) / (e + 1) with e = exp(2 |x|); e - 1 is exact to an ulp near 0 too.
template <class T>
HF_FLASH_INLINE Vector<T> tanh(Vector<T> x) {
  const Vector<T> magnitude = x < T(0) ? -x : x;
  const Vector<T> doubled = magnitude > T(20) ? splat<T>(40) : magnitude + magnitude;
  const ExpParts<T> e = exp_parts<T>(doubled);
  const Vector<T> minus_one = e.power * e.tail + (e.power - T(1));
  const Vector<T> value = minus_one / (minus_one + T(2));
  return x < T(0) ? -value : value;
}

}  // namespace
}  // namespace hf_flash::cpu::HF_FLASH_CPU_ISA
