// Arguments of the row ops, shared by the compiled backends: plain pointers and strides, free of torch.
#pragma once

#include <cstdint>

namespace spo {

enum class DType { f32, bf16, f16, f64 };

// Label of a row whose token lies in another shard of the vocabulary. The row's statistics are as usual, its log-prob
// is -inf, and its gradient lacks the label's term. No common mistake produces this number. The smallest int64 would
// not do, because casting NaN to an integer produces it.
constexpr std::int64_t kLabelElsewhere = -(std::int64_t{1} << 62) - 1;

// Rows [N, V] of a tensor [B, T, V] with unit stride along V. Strides are in elements. T is 1 for a tensor [N, V] and
// for all evenly spaced rows.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t T = 1, stride_b = 0, stride_t = 0;
};

// How the logits z come from the numbers x in memory: z = x if a is null, else z = a x if b is null, else
// z = b tanh(a x). The factors have the accumulation dtype ("acc" below).
struct Transform {
  const void *a = nullptr, *b = nullptr;  // one value for all rows (stride 0), or one value per row (stride 1)
  std::int64_t stride = 0;
};

// "kl" is the divergence of spo_kernels.reference.RowOptions.mixture: 0 for the KL, 1 for the reverse KL, a share
// between for the JSD.
constexpr bool is_jsd(double mixture) { return mixture > 0 && mixture < 1; }

// z: policy logits, r: reference logits; both are f64 or neither is. "acc" is the accumulation dtype: double for f64
// logits, float otherwise. V: columns that are read; rows of a tensor may be longer.
struct TokenStatsFwdArgs {
  Rows z, r;  // r.data may be null: no KL
  Transform of_z, of_r;
  const std::int64_t* labels;  // [N] or null: no log-probs
  const bool* mask;            // [N] or null: the KL of every row
  std::int64_t N, V, ignore_index;
  double mixture = 0;        // as above
  void *logps, *kl, *stats;  // acc [N], [N], [2, 4 or 5, N]
};

struct TokenStatsBwdArgs {
  Rows z, r, dz;  // dz may be z
  Transform of_z, of_r;
  const std::int64_t* labels;
  const bool* mask;
  std::int64_t N, V, padding, ignore_index;      // padding: columns after the first V, whose gradient is 0
  double mixture = 0;                            // as above
  const void *dlogps, *dkl, *dlse, *kl, *stats;  // acc; dlogps, dkl and dlse may be null
};

struct MixtureKlArgs {
  Rows z, r;
  Transform of_z, of_r;
  const bool* mask;
  std::int64_t N, V;
  double mixture;     // in (0, 1)
  const void* stats;  // acc [4 or 5, N]
  void* kls;          // acc [2, N]: KL(p || m), KL(q || m)
};

struct KlLossFwdArgs {
  Rows z, r, dz;  // dz may be z
  Transform of_z, of_r;
  const void* row_weight;      // acc [N] or null: 1
  std::int64_t N, V, padding;  // padding as above
  double mixture = 0;          // as above
  double* weighted_kl;         // [N]: row_weight times the KL
};

}  // namespace spo
