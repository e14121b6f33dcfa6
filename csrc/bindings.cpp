// The operators: their schemas and how they call the kernels. bindings.h and this file alone know torch, through its
// stable ABI: one build serves every torch from 2.10 on. Compiled twice: HF_FLASH_CPU defines the schemas and the CPU
// kernels, HF_FLASH_CUDA adds the CUDA kernels to them.
#include "bindings.h"

#include <torch/csrc/stable/accelerator.h>

#ifdef HF_FLASH_CUDA
#include <dlfcn.h>

#include "dispatch.h"
#else
#include "cpu/attention.h"
#endif

namespace hf_flash::bindings {
namespace {

Tensor contiguous_like(const Tensor& t) {
  return new_tensor(t, shape_with_last(t, t.size(t.dim() - 1)), t.scalar_type());
}

// ---- What differs between the two libraries: how a kernel is called ---------------------------------------------

#ifdef HF_FLASH_CUDA
#define HF_FLASH_DISPATCH_KEY CUDA
// torch's symbols are looked up at run time, so that the library also loads beside a torch that lacks them.
void* current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter get = reinterpret_cast<Getter>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  static const Getter fallback = [] {
    void* library = get ? nullptr : dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  const Getter getter = get ? get : fallback;
  require(getter != nullptr, "this torch has no CUDA (aoti_torch_get_current_cuda_stream is missing)");
  void* stream = nullptr;
  require(getter(device, &stream) == 0, "torch gave no current CUDA stream for device ", device);
  return stream;
}

struct Runner {
  static constexpr bool kWritesSums = true;  // of a broadcast bias's gradient: every element, in bias's dtype
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
  explicit Runner(const Tensor& q) : guard(q.get_device_index()), stream(current_stream(q.get_device_index())) {}
  // A mask of keys alone is no term of the score, and a padded call without key_range gets the range of what it shows,
  // whose tensor must outlive the launches: kernels then skip what lies outside, and need not take it for holes.
  OptionalTensor settle_key_mask(AttentionParams& p, const Tensor& q) const {
    p.take_key_mask();
    const bool asks = p.key_mask != nullptr && p.key_range == nullptr && !p.packed();
    if (!asks || p.total_q == 0 || p.heads_q == 0) return std::nullopt;
    const Tensor ranges = new_tensor(q, {p.batch, 2}, ScalarType::Int);
    cuda::key_ranges(p, static_cast<int32_t*>(ranges.data_ptr()), stream);
    p.key_range = static_cast<const int32_t*>(ranges.data_ptr());
    return ranges;
  }
  void forward(const AttentionParams& p) const { cuda::forward(p, stream); }
  void backward(const AttentionParams& p) const { cuda::backward(p, stream); }
  void row_sum(const AttentionParams& p) const { cuda::row_sum(p, stream); }
  void dropout_mask(bool* mask, const int64_t* seed, int64_t planes, int64_t rows, int64_t cols, int keep) const {
    cuda::dropout_mask(mask, seed, planes, rows, cols, keep, stream);
  }
  int64_t backward_workspace(const AttentionParams& p) const { return cuda::backward_workspace(p); }
};
#else
#define HF_FLASH_DISPATCH_KEY CPU
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { body(from, to, context); });
}

struct Runner {
  static constexpr bool kWritesSums = false;
  explicit Runner(const Tensor&) {}
  OptionalTensor settle_key_mask(AttentionParams&, const Tensor&) const { return std::nullopt; }
  void forward(const AttentionParams& p) const { cpu::forward(p, parallel_for); }
  void backward(const AttentionParams& p) const { cpu::backward(p, parallel_for); }
  void row_sum(const AttentionParams& p) const { cpu::row_sum(p, parallel_for); }
  void dropout_mask(bool* mask, const int64_t* seed, int64_t planes, int64_t rows, int64_t cols, int keep) const {
    cpu::dropout_mask(mask, seed, planes, rows, cols, keep, parallel_for);
  }
  int64_t backward_workspace(const AttentionParams& p) const { return cpu::backward_workspace(p); }
};
#endif

// ---- The operators ----------------------------------------------------------------------------------------------

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  Tensor q = args.take<Tensor>(), k = args.take<Tensor>(), v = args.take<Tensor>();
  const Tail tail(args);
  for (Tensor* t : {&q, &k, &v}) *t = kernel_ready(tail.heads_first ? swapped(*t) : *t);
  const Shape shape(q, k, tail);
  AttentionParams p = params_of(q, k, v, shape, tail);
  const Runner runner(q);
  const OptionalTensor own_ranges = runner.settle_key_mask(p, q);
  const Tensor out = new_tensor(q, shape_with_last(q, p.head_dim_v), q.scalar_type());
  const Tensor lse = new_tensor(q, shape.row_values, accumulator_of(p.dtype));
  p.out = rows_of(out);
  p.lse = row_values_of(lse);
  if (p.total_q > 0 && p.heads_q > 0) runner.forward(p);
  stack[0] = torch::stable::detail::from(out);
  stack[1] = torch::stable::detail::from(lse);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Tensor dout = kernel_ready(args.take<Tensor>());
  OptionalTensor dlse = args.take<OptionalTensor>();
  Tensor q = args.take<Tensor>(), k = args.take<Tensor>(), v = args.take<Tensor>();
  const Tensor out = kernel_ready(args.take<Tensor>());
  const Tensor lse = made_contiguous(args.take<Tensor>());
  const Tail tail(args);
  const bool need_dbias = args.take<bool>(), need_dsink = args.take<bool>();
  for (Tensor* t : {&q, &k, &v}) *t = kernel_ready(tail.heads_first ? swapped(*t) : *t);

  const Shape shape(q, k, tail);
  AttentionParams p = params_of(q, k, v, shape, tail);
  const ScalarType accumulator = accumulator_of(p.dtype);
  const auto check_out = [&](const Tensor& t, const char* name) {
    require_device(t, q, name);
    require(t.scalar_type() == q.scalar_type(), name, " must have q's dtype");
    require(has_shape(t, shape_with_last(q, p.head_dim_v)), name, " ", t, " must have the shape of out");
  };
  check_out(dout, "dout");
  check_out(out, "out");
  const auto check_row_values = [&](const Tensor& t, const char* name) {
    require_device(t, q, name);
    const bool fits = t.scalar_type() == accumulator && has_shape(t, shape.row_values);
    require(fits, name, " ", t, " must be forward's lse in shape and dtype");
  };
  check_row_values(lse, "lse");
  if (dlse) {
    dlse = made_contiguous(*dlse);
    check_row_values(*dlse, "dlse");
    p.dlse = row_values_of(*dlse);
  }

  const Runner runner(q);
  const OptionalTensor own_ranges = runner.settle_key_mask(p, q);
  Tensor dq = contiguous_like(q), dk = contiguous_like(k), dv = contiguous_like(v);
  p.dout = rows_of(dout);
  p.out = rows_of(out);
  p.lse = row_values_of(lse);
  p.dq = rows_of(dq);
  p.dk = rows_of(dk);
  p.dv = rows_of(dv);
  OptionalTensor dbias, dsink;
  if (need_dbias && tail.bias) {
    const BiasBroadcast broadcast(*tail.bias, p);
    p.dbias_sums = broadcast.sums;
    const bool own_dtype = Runner::kWritesSums && broadcast.sums;
    const ScalarType dtype = own_dtype ? tail.bias->scalar_type() : accumulator;
    const std::vector<int64_t> sizes = shape_with_last(*tail.bias, tail.bias->size(3));
    dbias = own_dtype && broadcast.reached ? new_tensor(*tail.bias, sizes, dtype)
                                           : torch::stable::new_zeros(*tail.bias, sizes, dtype);
    p.dbias = scores_of(*dbias, dtype_of(*dbias, "dbias"));
  }
  if (need_dsink && tail.sink) {
    dsink = torch::stable::new_zeros(q, {p.heads_q}, accumulator);
    p.dsink = dsink->data_ptr();
  }
  // One allocation: the row sums, then the architecture's own.
  const int64_t value_bytes = accumulator == ScalarType::Double ? 8 : 4;
  const int64_t sums = (p.total_q * p.heads_q * value_bytes + 255) / 256 * 256, own = runner.backward_workspace(p);
  const Tensor workspace = new_tensor(q, {sums + own}, ScalarType::Byte);
  p.row_sum = row_values_at(workspace.data_ptr(), p);
  p.workspace = own > 0 ? static_cast<char*>(workspace.data_ptr()) + sums : nullptr;
  if (p.batch > 0 && p.heads_q > 0) {
    runner.backward(p);
  } else {  // a packed batch of no sequences still has rows
    for (Tensor* gradient : {&dq, &dk, &dv}) torch::stable::zero_(*gradient);
    if (dbias) torch::stable::zero_(*dbias);
  }
  if (dbias && tail.bias->scalar_type() != dbias->scalar_type())
    dbias = torch::stable::to(*dbias, tail.bias->scalar_type());

  if (tail.heads_first) {
    for (Tensor* gradient : {&dq, &dk, &dv}) *gradient = swapped(*gradient);
  }
  stack[0] = torch::stable::detail::from(dq);
  stack[1] = torch::stable::detail::from(dk);
  stack[2] = torch::stable::detail::from(dv);
  stack[3] = torch::stable::detail::from(dbias);
  stack[4] = torch::stable::detail::from(dsink);
}

void row_sum(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Tensor dout = kernel_ready(args.take<Tensor>());
  const Tensor out = kernel_ready(args.take<Tensor>());
  OptionalTensor dlse = args.take<OptionalTensor>();
  const bool packed = out.dim() == 3;
  require(packed || out.dim() == 4, "out must be (B, S, H, D) or (T, H, D); got ", out);
  require(has_shape(dout, shape_with_last(out, out.size(out.dim() - 1))), "dout ", dout, " must have out's shape ",
          out);
  require(dout.scalar_type() == out.scalar_type(), "dout must have out's dtype");
  require_device(dout, out, "dout");
  AttentionParams p{};
  p.dtype = dtype_of(out, "out");
  p.batch = packed ? 1 : static_cast<int32_t>(out.size(0));
  p.seqlen_q = static_cast<int32_t>(out.size(packed ? 0 : 1));
  p.heads_q = p.heads_k = static_cast<int32_t>(out.size(packed ? 1 : 2));
  p.head_dim = p.head_dim_v = static_cast<int32_t>(out.size(packed ? 2 : 3));
  p.total_q = int64_t{p.batch} * p.seqlen_q;
  const std::vector<int64_t> sizes = packed ? std::vector<int64_t>{out.size(1), out.size(0)}
                                            : std::vector<int64_t>{out.size(0), out.size(2), out.size(1)};
  const ScalarType accumulator = accumulator_of(p.dtype);
  if (dlse) {
    dlse = made_contiguous(*dlse);
    require_device(*dlse, out, "dlse");
    require(dlse->scalar_type() == accumulator && dlse->numel() == p.total_q * p.heads_q, "dlse ", *dlse,
            " must be lse in shape and dtype");
    p.dlse = row_values_of(*dlse);
  }
  const Runner runner(out);
  const Tensor sums = new_tensor(out, sizes, accumulator);
  p.dout = rows_of(dout);
  p.out = rows_of(out);
  p.row_sum = row_values_of(sums);
  if (sums.numel() > 0) runner.row_sum(p);
  stack[0] = torch::stable::detail::from(sums);
}

void dropout_mask(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Tensor seed = args.take<Tensor>();
  const int64_t batch = args.take<int64_t>(), heads = args.take<int64_t>();
  const int64_t rows = args.take<int64_t>(), cols = args.take<int64_t>(), keep = args.take<int64_t>();
  require(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64 value");
  require(batch >= 0 && heads >= 0 && rows >= 0 && cols >= 0, "sizes must not be negative");
  require(keep >= 1 && keep <= 256, "keep must lie in 1..256; got ", keep);
  const Runner runner(seed);
  const Tensor mask = new_tensor(seed, {batch, heads, rows, cols}, ScalarType::Bool);
  if (mask.numel() > 0)
    runner.dropout_mask(static_cast<bool*>(mask.data_ptr()), static_cast<const int64_t*>(seed.data_ptr()),
                        batch * heads, rows, cols, static_cast<int>(keep));
  stack[0] = torch::stable::detail::from(mask);
}

}  // namespace
}  // namespace hf_flash::bindings

#ifndef HF_FLASH_CUDA
STABLE_TORCH_LIBRARY(hf_flash, m) {
  using hf_flash::bindings::kTailSchema;
  m.def(
      ("forward(Tensor q, Tensor k, Tensor v, " + std::string(kTailSchema) + ") -> (Tensor out, Tensor lse)").c_str());
  m.def(("backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " +
         std::string(kTailSchema) +
         ", bool need_dbias=False, bool need_dsink=False) "
         "-> (Tensor dq, Tensor dk, Tensor dv, Tensor? dbias, Tensor? dsink)")
            .c_str());
  m.def("row_sum(Tensor dout, Tensor out, Tensor? dlse) -> Tensor");
  m.def("dropout_mask(Tensor seed, SymInt batch, SymInt heads, SymInt seqlen_q, SymInt seqlen_k, int keep) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(hf_flash, HF_FLASH_DISPATCH_KEY, m) {
  m.impl("forward", &hf_flash::bindings::forward);
  m.impl("backward", &hf_flash::bindings::backward);
  m.impl("row_sum", &hf_flash::bindings::row_sum);
  m.impl("dropout_mask", &hf_flash::bindings::dropout_mask);
}
