// What the CTAs of a cluster do with each other's shared memory.
#pragma once

#include <cstdint>

namespace hf_flash {

// The place in another CTA's shared memory that an address of the own one stands for.
__device__ __forceinline__ uint32_t shared_address_of(uint32_t address, uint32_t rank) {
  uint32_t y;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(y) : "r"(address), "r"(rank));
  return y;
}

// All threads of the cluster meet.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// At a barrier of any CTA: what was read of shared memory before has been read. It says nothing of what was written.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same with so many bytes more that must land before the phase ends.
__device__ __forceinline__ void mbarrier_arrive_expect_bytes_remote(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// To another CTA, whose barrier expects the bytes; nobody waits here.
__device__ __forceinline__ void store_remote_16_bytes(uint32_t address, const uint4& x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(address),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
               : "memory");
}

// Copies `bytes` neighbouring bytes of the own shared memory there.
__device__ __forceinline__ void bulk_copy_remote(uint32_t address, uint32_t own, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
      "r"(own), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace hf_flash
