// The ops on CPU tensors: checks, outputs, threads. Schemas and gradients are in spo_kernels/ops.py; the arithmetic is
// in csrc/cpu, free of torch. torch's stable ABI only, so that one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/row_ops.h"

namespace {

using spo::cpu::DType;
using spo::cpu::Rows;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

ScalarType acc_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

Rows rows_of(const Tensor& t, const char* name, bool writable) {
  STD_TORCH_CHECK(t.dim() == 2 || t.dim() == 3, name, " must be [N, V] or [B, T, V], got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.size(-1) >= 1, name, " must have V >= 1");
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, name, " must have a unit last stride, got ", t.stride(-1));
  Rows rows;
  rows.data = writable ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  rows.dtype = dtype_of(t, name);
  rows.T = std::max<int64_t>(t.size(-2), 1);
  rows.stride_t = t.stride(-2);
  rows.stride_b = t.dim() == 3 ? t.stride(0) : 0;
  return rows;
}

int64_t row_count(const Tensor& t) { return t.dim() == 3 ? t.size(0) * t.size(1) : t.size(0); }

// A contiguous vector of one value a row, or null. The tensor returned keeps the data alive.
Tensor row_values(const Tensor& t, ScalarType dtype, int64_t N, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.numel() == N, name, " must have one element a row (", N, "), got ", t.numel());
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
OptionalTensor row_values(const OptionalTensor& t, ScalarType dtype, int64_t N, const char* name) {
  if (!t.has_value()) return std::nullopt;
  return row_values(*t, dtype, N, name);
}
template <class T>
const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

void check_labels(const OptionalTensor& labels, int64_t N, int64_t V, int64_t ignore_index) {
  if (!labels.has_value()) return;
  const auto* data = static_cast<const int64_t*>(labels->const_data_ptr());
  const int64_t bad = spo::cpu::first_bad_label(data, N, V, ignore_index);
  STD_TORCH_CHECK(bad < 0, "labels must be in [0, ", V, ") or ignore_index ", ignore_index, ", got ", data[bad],
                  " in row ", bad);
}

Rows ref_rows(const OptionalTensor& ref_logits, const Tensor& logits) {
  if (!ref_logits.has_value()) return {};
  const Rows rows = rows_of(*ref_logits, "ref_logits", false);
  bool same = ref_logits->dim() == logits.dim();
  for (int64_t d = 0; same && d < logits.dim(); ++d) same = ref_logits->size(d) == logits.size(d);
  STD_TORCH_CHECK(same, "ref_logits must have the shape of logits");
  STD_TORCH_CHECK((rows.dtype == DType::f64) == (dtype_of(logits, "logits") == DType::f64),
                  "ref_logits must be float64 exactly when logits are");
  return rows;
}

std::vector<int64_t> row_shape(const Tensor& logits) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) shape.push_back(logits.size(d));
  return shape;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
}

Tensor empty_contiguous_like(const Tensor& t) {
  std::vector<int64_t> shape = row_shape(t);
  shape.push_back(t.size(-1));
  return empty(t, shape, t.scalar_type());
}

// work(begin, end) over all rows. Workers draw small ranges from a common counter instead of getting one large range
// each: ignored rows cost nothing, and they come in runs (prompts, padding).
template <class F>
void for_rows(int64_t N, int64_t row_bytes, const F& work) {
  if (N == 0) return;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), N);
  const int64_t fill_mib = std::max<int64_t>((int64_t{1} << 20) / std::max<int64_t>(row_bytes, 1), 1);
  const int64_t chunk = std::clamp<int64_t>(N / (4 * workers), 1, fill_mib);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < N;) work(begin, std::min(begin + chunk, N));
  });
}

int64_t row_bytes(const Tensor& logits) { return logits.size(-1) * static_cast<int64_t>(logits.element_size()); }

std::tuple<Tensor, Tensor, Tensor> token_stats_fwd(const Tensor& logits, const OptionalTensor& labels,
                                                   const OptionalTensor& ref_logits, const OptionalTensor& mask,
                                                   int64_t ignore_index, bool /*inplace_backward*/) {
  const int64_t N = row_count(logits), V = logits.size(-1);
  const Rows z = rows_of(logits, "logits", false);
  const ScalarType acc = acc_type(z.dtype);
  const OptionalTensor labels_ = row_values(labels, ScalarType::Long, N, "labels");
  const OptionalTensor mask_ = row_values(mask, ScalarType::Bool, N, "mask");
  const Rows r = ref_rows(ref_logits, logits);
  check_labels(labels_, N, V, ignore_index);

  const std::vector<int64_t> rows = row_shape(logits);
  std::vector<int64_t> stats_shape{r.data ? 4 : 2};
  stats_shape.insert(stats_shape.end(), rows.begin(), rows.end());
  Tensor logps = empty(logits, labels ? rows : std::vector<int64_t>{0}, acc);
  Tensor kl = empty(logits, ref_logits ? rows : std::vector<int64_t>{0}, acc);
  Tensor stats = empty(logits, stats_shape, acc);
  const spo::cpu::TokenStatsFwd args{.z = z,
                                     .r = r,
                                     .labels = data_or_null<int64_t>(labels_),
                                     .mask = data_or_null<bool>(mask_),
                                     .N = N,
                                     .V = V,
                                     .ignore_index = ignore_index,
                                     .logps = logps.mutable_data_ptr(),
                                     .kl = kl.mutable_data_ptr(),
                                     .stats = stats.mutable_data_ptr()};
  for_rows(N, row_bytes(logits), [&](int64_t b, int64_t e) { spo::cpu::token_stats_fwd(args, b, e); });
  return {logps, kl, stats};
}

void token_stats_bwd_into(const Tensor& dlogits, const OptionalTensor& dlogps, const OptionalTensor& dkl,
                          const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& ref_logits,
                          const OptionalTensor& mask, const Tensor& kl, const Tensor& stats, int64_t ignore_index) {
  const int64_t N = row_count(logits), V = logits.size(-1);
  const Rows z = rows_of(logits, "logits", false);
  const ScalarType acc = acc_type(z.dtype);
  const Rows r = ref_rows(ref_logits, logits);
  const OptionalTensor labels_ = row_values(labels, ScalarType::Long, N, "labels");
  const OptionalTensor mask_ = row_values(mask, ScalarType::Bool, N, "mask");
  const OptionalTensor dlogps_ = row_values(dlogps, acc, N, "dlogps");
  const OptionalTensor dkl_ = row_values(dkl, acc, N, "dkl");
  STD_TORCH_CHECK(!dlogps || labels, "dlogps needs labels");
  STD_TORCH_CHECK(!dkl || ref_logits, "dkl needs ref_logits");
  const Tensor kl_ = row_values(kl, acc, r.data ? N : 0, "kl");
  const Tensor stats_ = row_values(stats, acc, (r.data ? 4 : 2) * N, "stats");
  check_labels(labels_, N, V, ignore_index);
  const spo::cpu::TokenStatsBwd args{.z = z,
                                     .r = r,
                                     .dz = rows_of(dlogits, "dlogits", true),
                                     .labels = data_or_null<int64_t>(labels_),
                                     .mask = data_or_null<bool>(mask_),
                                     .N = N,
                                     .V = V,
                                     .ignore_index = ignore_index,
                                     .dlogps = data_or_null<void>(dlogps_),
                                     .dkl = data_or_null<void>(dkl_),
                                     .kl = kl_.const_data_ptr(),
                                     .stats = stats_.const_data_ptr()};
  for_rows(N, row_bytes(logits), [&](int64_t b, int64_t e) { spo::cpu::token_stats_bwd(args, b, e); });
}

Tensor token_stats_bwd(const OptionalTensor& dlogps, const OptionalTensor& dkl, const Tensor& logits,
                       const OptionalTensor& labels, const OptionalTensor& ref_logits, const OptionalTensor& mask,
                       const Tensor& kl, const Tensor& stats, int64_t ignore_index) {
  Tensor dlogits = empty_contiguous_like(logits);
  token_stats_bwd_into(dlogits, dlogps, dkl, logits, labels, ref_logits, mask, kl, stats, ignore_index);
  return dlogits;
}

void token_stats_bwd_(const OptionalTensor& dlogps, const OptionalTensor& dkl, const Tensor& logits,
                      const OptionalTensor& labels, const OptionalTensor& ref_logits, const OptionalTensor& mask,
                      const Tensor& kl, const Tensor& stats, int64_t ignore_index) {
  token_stats_bwd_into(logits, dlogps, dkl, logits, labels, ref_logits, mask, kl, stats, ignore_index);
}

Tensor kl_loss_into(const Tensor& dlogits, const Tensor& logits, const Tensor& ref_logits,
                    const OptionalTensor& row_weight) {
  const int64_t N = row_count(logits), V = logits.size(-1);
  const Rows z = rows_of(logits, "logits", false);
  const ScalarType acc = acc_type(z.dtype);
  const OptionalTensor weight = row_values(row_weight, acc, N, "row_weight");
  std::vector<double> weighted_kl(N);
  const spo::cpu::KlLossFwd args{.z = z,
                                 .r = ref_rows(ref_logits, logits),
                                 .dz = rows_of(dlogits, "dlogits", true),
                                 .row_weight = data_or_null<void>(weight),
                                 .N = N,
                                 .V = V,
                                 .weighted_kl = weighted_kl.data()};
  for_rows(N, 2 * row_bytes(logits), [&](int64_t b, int64_t e) { spo::cpu::kl_loss_fwd(args, b, e); });
  double sum = 0;  // in row order, so that the loss does not depend on the threads
  for (const double x : weighted_kl) sum += x;
  Tensor loss = empty(logits, {}, acc);
  if (acc == ScalarType::Double)
    *static_cast<double*>(loss.mutable_data_ptr()) = sum;
  else
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(sum);
  return loss;
}

std::tuple<Tensor, Tensor> kl_loss_fwd(const Tensor& logits, const Tensor& ref_logits,
                                       const OptionalTensor& row_weight) {
  Tensor dlogits = empty_contiguous_like(logits);
  Tensor loss = kl_loss_into(dlogits, logits, ref_logits, row_weight);
  return {loss, dlogits};
}

Tensor kl_loss_fwd_(const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& row_weight) {
  return kl_loss_into(logits, logits, ref_logits, row_weight);
}

void scale_(const Tensor& tensor, const Tensor& scale) {
  STD_TORCH_CHECK(scale.numel() == 1, "scale must have one element, got ", scale.numel());
  const Rows rows = rows_of(tensor, "tensor", true);
  const DType dtype = dtype_of(scale, "scale");
  STD_TORCH_CHECK(scale.scalar_type() == acc_type(rows.dtype), "scale must have the accumulation dtype of tensor");
  const double factor = dtype == DType::f64 ? *static_cast<const double*>(scale.const_data_ptr())
                                            : *static_cast<const float*>(scale.const_data_ptr());
  if (factor == 1) return;
  for_rows(row_count(tensor), row_bytes(tensor),
           [&](int64_t b, int64_t e) { spo::cpu::scale(rows, tensor.size(-1), factor, b, e); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spo_kernels, CPU, m) {
  m.impl("token_stats_fwd", TORCH_BOX(&token_stats_fwd));
  m.impl("token_stats_bwd", TORCH_BOX(&token_stats_bwd));
  m.impl("token_stats_bwd_", TORCH_BOX(&token_stats_bwd_));
  m.impl("kl_loss_fwd", TORCH_BOX(&kl_loss_fwd));
  m.impl("kl_loss_fwd_", TORCH_BOX(&kl_loss_fwd_));
  m.impl("scale_", TORCH_BOX(&scale_));
}
