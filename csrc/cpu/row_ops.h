// The ops over ranges of rows, or of parts of rows (kPart): plain pointers and strides in, no torch. The caller spreads
// the ranges over threads; a row's result depends on nothing but that row.
//
// A forward needs all of a row before it knows anything: it takes whole rows, or, where these are too few for the
// threads, first the parts of all rows and then the rows of these parts, to the same bits. Part u is part u % P of row
// u / P, with P = parts_of_row.
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

void kl_loss_fwd(const KlLossFwdArgs& args, std::int64_t begin, std::int64_t end);                         // rows
void kl_loss_parts(const KlLossFwdArgs& args, RowPart* parts, std::int64_t begin, std::int64_t end);       // parts
void kl_loss_of_parts(const KlLossFwdArgs& args, const RowPart* parts, KlStats* stats);                    // all rows
void kl_loss_grad(const KlLossFwdArgs& args, const KlStats* stats, std::int64_t begin, std::int64_t end);  // parts

void scale(const Rows& rows, std::int64_t V, double scale, std::int64_t begin, std::int64_t end);  // parts

// Index of the first label that is neither in [0, V) nor ignore_index nor kLabelElsewhere; -1 if all are legal.
std::int64_t first_bad_label(const std::int64_t* labels, std::int64_t N, std::int64_t V, std::int64_t ignore_index);

}  // namespace spo::cpu
