// The ops on CPU tensors: checks, outputs, threads. spo_kernels/row_ops.py has the schemas and gradients, csrc/cpu the
// arithmetic. This file uses torch's stable ABI alone, so that one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "../cpu/row_ops.h"
#include "tensor_args.h"

namespace spo {
namespace {

template <class Args>
void check_labels(const Args& args) {
  if (!args.labels) return;
  const int64_t bad = cpu::first_bad_label(args.labels, args.N, args.V, args.ignore_index);
  STD_TORCH_CHECK(bad < 0, "labels must be in [0, ", args.V, ") or ignore_index ", args.ignore_index, ", got ",
                  args.labels[bad], " in row ", bad);
}

constexpr int64_t kGrainBytes = int64_t{64} << 10;  // a thread with less work costs more than it saves

// Calls work(begin, end) for ranges that together cover [0, count). An item is a row or a part of one. Workers draw
// small ranges, of at most 1 MiB, from a common counter. One large range for each worker would be uneven: ignored rows
// cost nothing and come in runs (prompts, padding).
template <class F>
void for_ranges(int64_t count, int64_t item_bytes, const F& work) {
  if (count == 0) return;
  const int64_t worthwhile_workers = std::max<int64_t>(count * item_bytes / kGrainBytes, 1);
  const int64_t workers = std::min({static_cast<int64_t>(torch::stable::get_num_threads()), count, worthwhile_workers});
  if (workers == 1) return work(0, count);
  const int64_t items_per_mib = std::max<int64_t>((int64_t{1} << 20) / std::max<int64_t>(item_bytes, 1), 1);
  const int64_t range = std::clamp<int64_t>(count / (4 * workers), 1, items_per_mib);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(range)) < count;) work(begin, std::min(begin + range, count));
  });
}

// How a call's rows are divided among threads. row_bytes: bytes of a row in `tensors` tensors of the logits' size.
struct Division {
  int64_t rows, row_bytes, parts;

  Division(const Tensor& logits, DType dtype, int64_t rows, int64_t V, int tensors = 1)
      : rows(rows),
        row_bytes(tensors * V * static_cast<int64_t>(logits.element_size())),
        parts(cpu::parts_of_row(dtype, V)) {}

  // Whether threads share the parts of rows in a forward, because there are too few rows to occupy all threads evenly.
  // A row with a transform, or with a divergence other than the KL, is read as a whole.
  template <class Args>
  bool shares_parts(const Args& args) const {
    const int64_t threads = torch::stable::get_num_threads();
    return parts > 1 && threads > 1 && rows < 4 * threads && !args.of_z.a && !args.of_r.a && args.mixture == 0;
  }
  template <class F>
  void for_row_ranges(const F& work) const {
    for_ranges(rows, row_bytes, work);
  }
  template <class F>
  void for_part_ranges(const F& work) const {
    for_ranges(rows * parts, row_bytes / parts, work);
  }
};

std::tuple<Tensor, Tensor, Tensor> token_stats_fwd(const Tensor& logits, const OptionalTensor& labels,
                                                   const OptionalTensor& ref_logits, const OptionalTensor& mask,
                                                   int64_t ignore_index, bool /*inplace_backward*/,
                                                   const OptionalInt& vocab_size, const OptionalTensor& transform,
                                                   const OptionalTensor& ref_transform, double mixture) {
  TokenStatsFwdCall call(logits, labels, ref_logits, mask, ignore_index,
                         {vocab_size, transform, ref_transform, mixture});
  check_labels(call.args);
  const Division division(logits, call.args.z.dtype, call.N, call.V, ref_logits ? 2 : 1);
  if (division.shares_parts(call.args)) {
    std::vector<cpu::RowPart> parts(division.rows * division.parts);
    division.for_part_ranges([&](int64_t b, int64_t e) { cpu::token_stats_parts(call.args, parts.data(), b, e); });
    cpu::token_stats_of_parts(call.args, parts.data());
  } else {
    division.for_row_ranges([&](int64_t b, int64_t e) { cpu::token_stats_fwd(call.args, b, e); });
  }
  return {call.logps, call.kl, call.stats};
}

void token_stats_bwd_into(const Tensor& dlogits, const OptionalTensor& dlogps, const OptionalTensor& dkl,
                          const OptionalTensor& dlse, const Tensor& logits, const OptionalTensor& labels,
                          const OptionalTensor& ref_logits, const OptionalTensor& mask, const Tensor& kl,
                          const Tensor& stats, int64_t ignore_index, const RowOptions& options) {
  const TokenStatsBwdCall call(dlogits, dlogps, dkl, dlse, logits, labels, ref_logits, mask, kl, stats, ignore_index,
                               options);
  check_labels(call.args);
  const Division division(logits, call.args.z.dtype, call.N, call.V);
  division.for_part_ranges([&](int64_t b, int64_t e) { cpu::token_stats_bwd(call.args, b, e); });
}

Tensor token_stats_bwd(const OptionalTensor& dlogps, const OptionalTensor& dkl, const OptionalTensor& dlse,
                       const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& ref_logits,
                       const OptionalTensor& mask, const Tensor& kl, const Tensor& stats, int64_t ignore_index,
                       const OptionalInt& vocab_size, const OptionalTensor& transform,
                       const OptionalTensor& ref_transform, double mixture) {
  Tensor dlogits = empty_contiguous_like(logits);
  token_stats_bwd_into(dlogits, dlogps, dkl, dlse, logits, labels, ref_logits, mask, kl, stats, ignore_index,
                       {vocab_size, transform, ref_transform, mixture});
  return dlogits;
}

void token_stats_bwd_(const OptionalTensor& dlogps, const OptionalTensor& dkl, const OptionalTensor& dlse,
                      const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& ref_logits,
                      const OptionalTensor& mask, const Tensor& kl, const Tensor& stats, int64_t ignore_index,
                      const OptionalInt& vocab_size, const OptionalTensor& transform,
                      const OptionalTensor& ref_transform, double mixture) {
  token_stats_bwd_into(logits, dlogps, dkl, dlse, logits, labels, ref_logits, mask, kl, stats, ignore_index,
                       {vocab_size, transform, ref_transform, mixture});
}

Tensor mixture_kl(const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& mask, const Tensor& stats,
                  const OptionalInt& vocab_size, const OptionalTensor& transform, const OptionalTensor& ref_transform,
                  double mixture) {
  const MixtureKlCall call(logits, ref_logits, mask, stats, {vocab_size, transform, ref_transform, mixture});
  const Division division(logits, call.args.z.dtype, call.N, call.V, 2);
  division.for_row_ranges([&](int64_t b, int64_t e) { cpu::mixture_kl(call.args, b, e); });
  return call.kls;
}

Tensor kl_loss_into(const Tensor& dlogits, const Tensor& logits, const Tensor& ref_logits,
                    const OptionalTensor& row_weight, const RowOptions& options) {
  KlLossFwdCall call(dlogits, logits, ref_logits, row_weight, options);
  std::vector<double> weighted_kl(call.args.N);
  call.args.weighted_kl = weighted_kl.data();
  const Division division(logits, call.args.z.dtype, call.N, call.V, 2);
  if (division.shares_parts(call.args)) {
    std::vector<cpu::RowPart> parts(division.rows * division.parts);
    std::vector<cpu::KlStats> stats(division.rows);
    division.for_part_ranges([&](int64_t b, int64_t e) { cpu::kl_loss_parts(call.args, parts.data(), b, e); });
    cpu::kl_loss_of_parts(call.args, parts.data(), stats.data());
    division.for_part_ranges([&](int64_t b, int64_t e) { cpu::kl_loss_grad(call.args, stats.data(), b, e); });
  } else {
    division.for_row_ranges([&](int64_t b, int64_t e) { cpu::kl_loss_fwd(call.args, b, e); });
  }
  double sum = 0;  // in row order, so that the loss does not depend on the number of threads
  for (const double x : weighted_kl) sum += x;
  Tensor loss = empty(logits, {}, call.acc);
  if (call.acc == ScalarType::Double)
    *static_cast<double*>(loss.mutable_data_ptr()) = sum;
  else
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(sum);
  return loss;
}

std::tuple<Tensor, Tensor> kl_loss_fwd(const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& row_weight,
                                       const OptionalInt& vocab_size, const OptionalTensor& transform,
                                       const OptionalTensor& ref_transform, double mixture) {
  Tensor dlogits = empty_contiguous_like(logits);
  Tensor loss = kl_loss_into(dlogits, logits, ref_logits, row_weight, {vocab_size, transform, ref_transform, mixture});
  return {loss, dlogits};
}

Tensor kl_loss_fwd_(const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& row_weight,
                    const OptionalInt& vocab_size, const OptionalTensor& transform, const OptionalTensor& ref_transform,
                    double mixture) {
  return kl_loss_into(logits, logits, ref_logits, row_weight, {vocab_size, transform, ref_transform, mixture});
}

void scale_(const Tensor& tensor, const Tensor& scale) {
  const Rows rows = scale_rows(tensor, scale);
  const double value = rows.dtype == DType::f64 ? *static_cast<const double*>(scale.const_data_ptr())
                                                : *static_cast<const float*>(scale.const_data_ptr());
  if (value == 1) return;
  const Division division(tensor, rows.dtype, row_count(tensor), tensor.size(-1));
  division.for_part_ranges([&](int64_t b, int64_t e) { cpu::scale(rows, tensor.size(-1), value, b, e); });
}

}  // namespace
}  // namespace spo

STABLE_TORCH_LIBRARY_IMPL(spo_kernels, CPU, m) {
  m.impl("token_stats_fwd", TORCH_BOX(&spo::token_stats_fwd));
  m.impl("token_stats_bwd", TORCH_BOX(&spo::token_stats_bwd));
  m.impl("token_stats_bwd_", TORCH_BOX(&spo::token_stats_bwd_));
  m.impl("mixture_kl", TORCH_BOX(&spo::mixture_kl));
  m.impl("kl_loss_fwd", TORCH_BOX(&spo::kl_loss_fwd));
  m.impl("kl_loss_fwd_", TORCH_BOX(&spo::kl_loss_fwd_));
  m.impl("scale_", TORCH_BOX(&spo::scale_));
}
