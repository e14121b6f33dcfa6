// The dtypes of the contract as C++ types, and 16 bytes of them as one load or store.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

#include "params.h"

namespace hf_flash {

template <class Element>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(Element);
  Element element[kSize];
};

// Of memory that nobody reads again for long: it makes room in the L2 cache before anything else does.
template <class Element>
__device__ __forceinline__ Vector<Element> load_for_the_last_time(const Element* from) {
  union {
    uint4 bits;
    Vector<Element> vector;
  };
  bits = __ldcs(reinterpret_cast<const uint4*>(from));
  return vector;
}

// What sums of an element type are kept in.
template <class Element>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

template <class Sum, class Element>
__device__ __forceinline__ Sum widen(Element x) {
  return static_cast<Sum>(x);
}

// Calls run(Element{}) with the type of a run-time dtype.
template <class Run>
void with_element(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat16: return run(__half{});
    case DType::kBFloat16: return run(__nv_bfloat16{});
    case DType::kFloat32: return run(float{});
    case DType::kFloat64: return run(double{});
  }
  throw std::runtime_error("hf_flash: unknown dtype");
}

}  // namespace hf_flash
