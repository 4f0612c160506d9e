// Arguments of the row ops, the same for every compiled backend: plain pointers and strides, no torch.
#pragma once

#include <cstdint>

namespace spo {

enum class DType { f32, bf16, f16, f64 };

// Label of a row whose token lies in another part of the vocabulary: the row counts as any other, its log-prob is -inf
// and its gradient has no 1. A number that no mistake makes: the least is what a NaN becomes as an integer.
constexpr std::int64_t kLabelElsewhere = -(std::int64_t{1} << 62) - 1;

// Rows [N, V] of a tensor [B, T, V] with unit stride along V; strides in elements. T = 1 for [N, V] and wherever the
// rows are evenly spaced.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t T = 1, stride_b = 0, stride_t = 0;
};

// Accumulation dtype ("acc"): double for f64 logits, float otherwise. Policy and reference are both f64 or neither.
struct TokenStatsFwdArgs {
  Rows z, r;                   // r.data may be null: no KL
  const std::int64_t* labels;  // [N] or null: no log-probs
  const bool* mask;            // [N] or null: KL of every row
  std::int64_t N, V, ignore_index;
  void *logps, *kl, *stats;  // acc [N], [N], [2 or 4, N]
};

struct TokenStatsBwdArgs {
  Rows z, r, dz;  // dz may be z
  const std::int64_t* labels;
  const bool* mask;
  std::int64_t N, V, ignore_index;
  const void *dlogps, *dkl, *kl, *stats;  // acc; dlogps and dkl may be null
};

struct KlLossFwdArgs {
  Rows z, r, dz;           // dz may be z
  const void* row_weight;  // acc [N] or null: 1
  std::int64_t N, V;
  double* weighted_kl;  // [N]: row_weight kl
};

}  // namespace spo
