// The row kernels in plain double arithmetic, for float64 logits and for rows without a finite logit or log-sum-exp.
#pragma once

#include <cmath>
#include <limits>

#include "row_kernels.h"

namespace spo::cpu::scalar {

template <class T>
static RowStats logits_stats(const T* z, std::int64_t V) {
  double shift = -INFINITY;
  for (std::int64_t v = 0; v < V; ++v) shift = std::fmax(shift, to_double(z[v]));
  if (shift == -INFINITY) shift = 0;  // as in the oracle: a row of only -inf has logsum -inf
  double sum = 0;
  for (std::int64_t v = 0; v < V; ++v) sum += std::exp(to_double(z[v]) - shift);
  return {shift, std::log(sum)};
}

template <class T>
static double log_prob(T z, const RowStats& stats) {
  return (to_double(z) - stats.shift) - stats.logsum;
}

template <class T, class R>
static KlStats kl_stats(const T* z, const R* r, std::int64_t V) {
  const RowStats policy = logits_stats(z, V), ref = logits_stats(r, V);
  double kl = 0;
  for (std::int64_t v = 0; v < V; ++v) {
    const double log_p = log_prob(z[v], policy), p = std::exp(log_p);
    if (p != 0) kl += p * (log_p - log_prob(r[v], ref));
  }
  return {policy, ref, kl};
}

template <class T>
static double label_grad_logp(const T* z, const RowStats& stats, const RowGrad& grad) {
  const double p = std::exp(log_prob(z[grad.label], stats));
  return grad.g_logp * (1 - p) + grad.g_lse * p;
}

template <class T, class R>
static double label_grad_kl(const T* z, const R* r, const KlStats& stats, const RowGrad& grad) {
  const double log_p = log_prob(z[grad.label], stats.policy), p = std::exp(log_p);
  const double kl_term = p != 0 ? grad.g_kl * p * (log_p - log_prob(r[grad.label], stats.ref) - stats.kl) : 0;
  return grad.g_logp * (1 - p) + grad.g_lse * p + kl_term;
}

template <class T>
static void grad_logp(const T* z, T* dz, std::int64_t V, const RowStats& stats, const RowGrad& grad) {
  for (std::int64_t v = 0; v < V; ++v) {
    const double p = std::exp(log_prob(z[v], stats));
    from_double(grad.g_logp * ((v == grad.label) - p) + grad.g_lse * p, dz[v]);
  }
}

template <class T, class R>
static void grad_kl(const T* z, const R* r, T* dz, std::int64_t V, const KlStats& stats, const RowGrad& grad) {
  for (std::int64_t v = 0; v < V; ++v) {
    const double log_p = log_prob(z[v], stats.policy), p = std::exp(log_p);
    const double kl_term = p != 0 ? grad.g_kl * p * (log_p - log_prob(r[v], stats.ref) - stats.kl) : 0;
    from_double(grad.g_logp * ((v == grad.label) - p) + grad.g_lse * p + kl_term, dz[v]);
  }
}

// log(p / m) and log(q / m) of a token, where gap = log p - log q.
struct LogShares {
  double of_policy, of_ref;
};
static inline LogShares log_shares(double gap, double mixture) {
  const double far = std::exp(-std::fabs(gap)), rest = 1 - mixture;
  const double log_sum = std::log(gap < 0 ? rest + mixture * far : mixture + rest * far);
  return {(gap < 0 ? gap : 0) - log_sum, (gap > 0 ? -gap : 0) - log_sum};
}

template <class T, class R>
static MixtureKl mixture_kl(const T* z, const R* r, std::int64_t V, const KlStats& stats, double mixture) {
  MixtureKl kl{};
  for (std::int64_t v = 0; v < V; ++v) {
    const double log_p = log_prob(z[v], stats.policy), log_q = log_prob(r[v], stats.ref);
    const double p = std::exp(log_p), q = std::exp(log_q);
    const LogShares shares = log_shares(log_p - log_q, mixture);
    if (p != 0) kl.of_policy += p * shares.of_policy;
    if (q != 0) kl.of_ref += q * shares.of_ref;
  }
  return kl;
}

template <class T, class R>
static double grad_mixture_of(T z, R r, bool at_label, const KlStats& stats, const RowGrad& grad, double mixture) {
  const double log_p = log_prob(z, stats.policy), log_q = log_prob(r, stats.ref), p = std::exp(log_p);
  const double slope = mixture == 1 ? p - std::exp(log_q)
                       : p == 0     ? 0
                                    : mixture * p * (log_shares(log_p - log_q, mixture).of_policy - stats.kl);
  return grad.g_logp * (at_label - p) + grad.g_lse * p + grad.g_kl * slope;
}

template <class T, class R>
static void grad_mixture(const T* z, const R* r, T* dz, std::int64_t V, const KlStats& stats, const RowGrad& grad,
                         double mixture) {
  for (std::int64_t v = 0; v < V; ++v)
    from_double(grad_mixture_of(z[v], r[v], v == grad.label, stats, grad, mixture), dz[v]);
}

template <class T>
static void scale(T* x, std::int64_t n, double scale) {
  for (std::int64_t i = 0; i < n; ++i) from_double(to_double(x[i]) * scale, x[i]);
}

static inline void transform(const double* x, double* z, std::int64_t n, const Factors& f) {
  for (std::int64_t i = 0; i < n; ++i) z[i] = f.capped ? f.b * std::tanh(f.a * x[i]) : f.a * x[i];
}

static inline void transform_grad(const double* x, const double* dz, double* dx, std::int64_t n, const Factors& f) {
  for (std::int64_t i = 0; i < n; ++i) {
    const double t = f.capped ? std::tanh(f.a * x[i]) : 0;
    dx[i] = dz[i] * (f.a * f.b * (1 - t * t));
  }
}

static inline RowKernels<double, double> kernels() {
  return {nullptr,
          nullptr,
          [](const double* z, std::int64_t V, const RowPart*) { return logits_stats(z, V); },
          [](const double* z, const double* r, std::int64_t V, const RowPart*) { return kl_stats(z, r, V); },
          grad_logp<double>,
          grad_kl<double, double>,
          nullptr,
          [](const double* r, const double* z, std::int64_t V, const RowPart*) { return kl_stats(r, z, V); },
          mixture_kl<double, double>,
          grad_mixture<double, double>,
          scale<double>,
          transform,
          transform,
          transform_grad};
}

}  // namespace spo::cpu::scalar
