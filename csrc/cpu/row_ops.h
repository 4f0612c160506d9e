// The ops over ranges [begin, end) of rows, or of parts of rows (kPart): plain pointers and strides, free of torch. The
// caller spreads the ranges over threads. A row's result depends on that row alone.
//
// A forward runs in one of two ways, with bitwise equal results. Many rows: one thread a row. Few rows: threads share
// the parts of all rows (`*_parts`), then each row is assembled from its parts (`*_of_parts`). Part u is part u % P of
// row u / P, where P = parts_of_row. A forward by parts takes no transform.
#pragma once

#include <cstdint>

#include "../op_args.h"
#include "row_kernels.h"

namespace spo::cpu {

std::int64_t parts_of_row(DType dtype, std::int64_t V);

void token_stats_fwd(const TokenStatsFwdArgs& args, std::int64_t begin, std::int64_t end);                    // rows
void token_stats_parts(const TokenStatsFwdArgs& args, RowPart* parts, std::int64_t begin, std::int64_t end);  // parts
void token_stats_of_parts(const TokenStatsFwdArgs& args, const RowPart* parts);  // all rows

void token_stats_bwd(const TokenStatsBwdArgs& args, std::int64_t begin, std::int64_t end);  // parts

void mixture_kl(const MixtureKlArgs& args, std::int64_t begin, std::int64_t end);  // rows

void kl_loss_fwd(const KlLossFwdArgs& args, std::int64_t begin, std::int64_t end);                         // rows
void kl_loss_parts(const KlLossFwdArgs& args, RowPart* parts, std::int64_t begin, std::int64_t end);       // parts
void kl_loss_of_parts(const KlLossFwdArgs& args, const RowPart* parts, KlStats* stats);                    // all rows
void kl_loss_grad(const KlLossFwdArgs& args, const KlStats* stats, std::int64_t begin, std::int64_t end);  // parts

void scale(const Rows& rows, std::int64_t V, double scale, std::int64_t begin, std::int64_t end);  // parts

// Index of the first illegal label; -1 if each is in [0, V), ignore_index or kLabelElsewhere.
std::int64_t first_bad_label(const std::int64_t* labels, std::int64_t N, std::int64_t V, std::int64_t ignore_index);

}  // namespace spo::cpu
