// The ops over a range of rows: plain pointers and strides in, no torch. The caller spreads the ranges over threads; a
// row's result depends on nothing but that row.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace spo::cpu {

// Rows [N, V] of a tensor [B, T, V] (B = 1 for [N, V]) with unit stride along V; strides in elements.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t T = 1, stride_b = 0, stride_t = 0;
};

// Accumulation dtype ("acc"): double for f64 logits, float otherwise. Policy and reference are both f64 or neither.
struct TokenStatsFwd {
  Rows z, r;                   // r.data may be null: no KL
  const std::int64_t* labels;  // [N] or null: no log-probs
  const bool* mask;            // [N] or null: KL of every row
  std::int64_t N, V, ignore_index;
  void *logps, *kl, *stats;  // acc [N], [N], [2 or 4, N]
};
void token_stats_fwd(const TokenStatsFwd& args, std::int64_t begin, std::int64_t end);

struct TokenStatsBwd {
  Rows z, r, dz;  // dz may be z
  const std::int64_t* labels;
  const bool* mask;
  std::int64_t N, V, ignore_index;
  const void *dlogps, *dkl, *kl, *stats;  // acc; dlogps and dkl may be null
};
void token_stats_bwd(const TokenStatsBwd& args, std::int64_t begin, std::int64_t end);

struct KlLossFwd {
  Rows z, r, dz;           // dz may be z
  const void* row_weight;  // acc [N] or null: 1
  std::int64_t N, V;
  double* weighted_kl;  // [N]: row_weight kl
};
void kl_loss_fwd(const KlLossFwd& args, std::int64_t begin, std::int64_t end);

void scale(const Rows& rows, std::int64_t V, double factor, std::int64_t begin, std::int64_t end);

// Index of the first label that is neither in [0, V) nor ignore_index; -1 if all are legal.
std::int64_t first_bad_label(const std::int64_t* labels, std::int64_t N, std::int64_t V, std::int64_t ignore_index);

}  // namespace spo::cpu
