// The element types of q, k, v, out and their gradients, and what they are computed in: float64 in float64, all others
// in float32. Conversions are branch-free integer arithmetic on bit patterns, so that loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace hf_flash::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class Element>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <class Element>
using ComputeType = typename ComputeTypeOf<Element>::type;

namespace {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double to_compute(double x) { return x; }
inline float to_compute(float x) { return x; }
inline float to_compute(BFloat16 x) { return float_of_bits(uint32_t{x.bits} << 16); }

inline float to_compute(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7FFFu;
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  // Exponents are 15 from the bottom in float16 and 127 in float32; infinity and NaN go from 31 to 255.
  const uint32_t rebias = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal = bits_of_float(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of_bits((magnitude < 0x400u ? subnormal : normal) | sign);
}

// Round to nearest, ties to even, as torch does; NaN stays NaN.
inline void from_compute(double x, double* to) { *to = x; }
inline void from_compute(float x, float* to) { *to = x; }

inline void from_compute(float x, BFloat16* to) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  to->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}

inline void from_compute(float x, Float16* to) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 lets the adder round to multiples of 2^-24, which is float16's smallest step.
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  to->bits = static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | ((bits >> 16) & 0x8000u));
}

}  // namespace
}  // namespace hf_flash::cpu
