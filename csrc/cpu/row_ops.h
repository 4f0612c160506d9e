// The ops over a range of rows: plain pointers and strides in, no torch. The caller spreads the ranges over threads; a
// row's result depends on nothing but that row.
#pragma once

#include <cstdint>

#include "../row_args.h"

namespace spo::cpu {

void token_stats_fwd(const TokenStatsFwd& args, std::int64_t begin, std::int64_t end);
void token_stats_bwd(const TokenStatsBwd& args, std::int64_t begin, std::int64_t end);
void kl_loss_fwd(const KlLossFwd& args, std::int64_t begin, std::int64_t end);
void scale(const Rows& rows, std::int64_t V, double factor, std::int64_t begin, std::int64_t end);

// Index of the first label that is neither in [0, V) nor ignore_index nor kLabelElsewhere; -1 if all are legal.
std::int64_t first_bad_label(const std::int64_t* labels, std::int64_t N, std::int64_t V, std::int64_t ignore_index);

}  // namespace spo::cpu
