// The row ops under ASan and UBSan. Every allocation ends where the logits end, and rows start at odd offsets. Results
// are compared with plain double loops. Prints "ok <level>" for each SIMD level of this CPU, or exits 1 at the first
// wrong value.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "dtype.h"
#include "row_ops.h"
#include "simd_level.h"

using namespace spo;
using namespace spo::cpu;

namespace {

std::mt19937 rng(0);

// A tensor [B, T, V] in a heap block of exactly its bytes, after `lead` elements.
template <class T>
struct Block {
  std::unique_ptr<T[]> data;
  Rows rows;
  Block(std::int64_t B, std::int64_t steps, std::int64_t V, std::int64_t pad, std::int64_t lead, DType dtype,
        double spread) {
    const std::int64_t stride_t = V + pad, stride_b = stride_t * (steps + 1);
    const std::int64_t size = lead + (B - 1) * stride_b + (steps - 1) * stride_t + V;
    data = std::make_unique<T[]>(size);
    std::normal_distribution<double> normal(0, spread);
    for (std::int64_t i = 0; i < size; ++i) from_double(normal(rng), data[i]);
    rows = {data.get() + lead, dtype, steps, stride_b, stride_t};
  }
  T* row(std::int64_t i) const {
    return static_cast<T*>(rows.data) + i / rows.T * rows.stride_b + i % rows.T * rows.stride_t;
  }
};

void require(bool right, const char* what, double got, double want) {
  if (right) return;
  std::printf("%s: got %.9g, want %.9g\n", what, got, want);
  std::exit(1);
}
void close(const char* what, double got, double want, double tolerance) {
  require(std::fabs(got - want) <= tolerance * std::fmax(1, std::fabs(want)), what, got, want);
}

template <class T>
double lse(const T* z, std::int64_t V) {
  double m = -INFINITY, s = 0;
  for (std::int64_t v = 0; v < V; ++v) m = std::fmax(m, to_double(z[v]));
  for (std::int64_t v = 0; v < V; ++v) s += std::exp(to_double(z[v]) - m);
  return m + std::log(s);
}

template <class T, class R>
void check(DType dtype_z, DType dtype_r, std::int64_t V, std::int64_t pad, std::int64_t lead, double spread) {
  const std::int64_t B = 2, steps = 3, N = B * steps, ignore = -100;
  const Block<T> z(B, steps, V, pad, lead, dtype_z, spread);
  const Block<R> r(B, steps, V, 2 * pad, lead + 1, dtype_r, spread);
  const std::vector<std::int64_t> labels{0, V - 1, ignore, V / 2, 0, ignore};
  const std::unique_ptr<bool[]> mask(new bool[N]{true, false, true, true, true, false});
  std::vector<float> logps(N, NAN), kl(N, NAN), stats(4 * N, NAN), dlogps(N, -1.5f), dkl(N, 0.75f);

  const std::int64_t P = N * parts_of_row(dtype_z, V);
  const TokenStatsFwdArgs fwd{.z = z.rows,
                              .r = r.rows,
                              .labels = labels.data(),
                              .mask = mask.get(),
                              .N = N,
                              .V = V,
                              .ignore_index = ignore,
                              .logps = logps.data(),
                              .kl = kl.data(),
                              .stats = stats.data()};
  token_stats_fwd(fwd, 0, N);
  Block<T> dz(B, steps, V, pad, lead, dtype_z, spread);
  TokenStatsBwdArgs bwd{.z = z.rows,
                        .r = r.rows,
                        .dz = dz.rows,
                        .labels = labels.data(),
                        .mask = mask.get(),
                        .N = N,
                        .V = V,
                        .ignore_index = ignore,
                        .dlogps = dlogps.data(),
                        .dkl = dkl.data(),
                        .kl = kl.data(),
                        .stats = stats.data()};
  token_stats_bwd(bwd, 0, P);

  const double half = sizeof(T) == 2 ? 0x1p-8 : 0;
  for (std::int64_t i = 0; i < N; ++i) {
    const double lse_z = lse(z.row(i), V), lse_r = lse(r.row(i), V);
    const bool with_logp = labels[i] != ignore;
    double want_kl = 0;
    for (std::int64_t v = 0; v < V; ++v) {
      const double log_p = to_double(z.row(i)[v]) - lse_z;
      want_kl += std::exp(log_p) * (log_p - (to_double(r.row(i)[v]) - lse_r));
    }
    close("logp", logps[i], with_logp ? to_double(z.row(i)[labels[i]]) - lse_z : 0, 4e-6);
    close("kl", kl[i], mask[i] ? want_kl : 0, 4e-6);
    for (std::int64_t v = 0; v < V; ++v) {
      const double log_p = to_double(z.row(i)[v]) - lse_z, p = std::exp(log_p);
      const double gap = log_p - (to_double(r.row(i)[v]) - lse_r) - want_kl;
      const double want = (with_logp ? -1.5 * ((v == labels[i]) - p) : 0) + (mask[i] ? 0.75 * p * gap : 0);
      close("dlogits", to_double(dz.row(i)[v]), want, 2e-5 + half);
    }
  }

  std::vector<double> weighted(N), weighted_of_parts(N);
  KlLossFwdArgs loss{.z = z.rows,
                     .r = r.rows,
                     .dz = dz.rows,
                     .row_weight = dkl.data(),
                     .N = N,
                     .V = V,
                     .weighted_kl = weighted.data()};
  kl_loss_fwd(loss, 0, N);
  scale(dz.rows, V, 0.5, 0, P);

  std::vector<RowPart> parts(P);
  std::vector<KlStats> kl_stats(N);
  std::vector<float> logps_of_parts(N, NAN), kl_of_parts(N, NAN), stats_of_parts(4 * N, NAN);
  TokenStatsFwdArgs fwd_of_parts = fwd;
  fwd_of_parts.logps = logps_of_parts.data(), fwd_of_parts.kl = kl_of_parts.data();
  fwd_of_parts.stats = stats_of_parts.data();
  for (std::int64_t u = P; u-- > 0;) token_stats_parts(fwd_of_parts, parts.data(), u, u + 1);
  token_stats_of_parts(fwd_of_parts, parts.data());
  loss.weighted_kl = weighted_of_parts.data();
  for (std::int64_t u = P; u-- > 0;) kl_loss_parts(loss, parts.data(), u, u + 1);
  kl_loss_of_parts(loss, parts.data(), kl_stats.data());
  kl_loss_grad(loss, kl_stats.data(), 0, P);
  for (std::int64_t i = 0; i < N; ++i) {
    require(logps_of_parts[i] == logps[i], "logp of parts", logps_of_parts[i], logps[i]);
    require(kl_of_parts[i] == kl[i], "kl of parts", kl_of_parts[i], kl[i]);
    require(weighted_of_parts[i] == weighted[i], "loss of parts", weighted_of_parts[i], weighted[i]);
  }

  bwd.dz = z.rows;  // in place, and last, since it overwrites z
  token_stats_bwd(bwd, 0, P);
}

// A softcap with factors of each row for the policy, one factor for the reference, and columns after the first V.
template <class T, class R>
void check_transformed(DType dtype_z, DType dtype_r, std::int64_t V, std::int64_t padding) {
  const std::int64_t N = 6;
  Block<T> z(2, 3, V + padding, 0, 1, dtype_z, 3.), dz(2, 3, V + padding, 1, 0, dtype_z, 3.);
  const Block<R> r(2, 3, V + padding + 1, 0, 1, dtype_r, 3.);
  const std::vector<float> a{.1f, .2f, .3f, -.2f, .5f, 1.f}, b{5, 6, 7, 8, 9, 2}, ref_a{.7f};
  const std::vector<float> ones(N, 1), dlse{.5f, 0, -1, 2, 0, .25f};
  const std::vector<std::int64_t> labels{0, V - 1, V / 2, 0, V - 1, 0};
  std::vector<float> logps(N, NAN), kl(N, NAN), stats(4 * N, NAN);
  std::vector<double> weighted(N);
  const Transform of_z{a.data(), b.data(), 1}, of_r{.a = ref_a.data()};
  const TokenStatsFwdArgs fwd{.z = z.rows,
                              .r = r.rows,
                              .of_z = of_z,
                              .of_r = of_r,
                              .labels = labels.data(),
                              .N = N,
                              .V = V,
                              .ignore_index = -100,
                              .logps = logps.data(),
                              .kl = kl.data(),
                              .stats = stats.data()};
  token_stats_fwd(fwd, 0, N);
  const TokenStatsBwdArgs bwd{.z = z.rows,
                              .r = r.rows,
                              .dz = dz.rows,
                              .of_z = of_z,
                              .of_r = of_r,
                              .labels = labels.data(),
                              .N = N,
                              .V = V,
                              .padding = padding,
                              .ignore_index = -100,
                              .dlogps = ones.data(),
                              .dkl = ones.data(),
                              .dlse = dlse.data(),
                              .kl = kl.data(),
                              .stats = stats.data()};
  token_stats_bwd(bwd, 0, N * parts_of_row(dtype_z, V));
  const double half = sizeof(T) == 2 ? 0x1p-8 : 0;
  for (std::int64_t i = 0; i < N; ++i) {
    std::vector<double> x(V), slope(V), y(V);
    for (std::int64_t v = 0; v < V; ++v) {
      const double t = std::tanh(a[i] * to_double(z.row(i)[v]));
      x[v] = b[i] * t, slope[v] = a[i] * b[i] * (1 - t * t), y[v] = ref_a[0] * to_double(r.row(i)[v]);
    }
    const double lse_x = lse(x.data(), V), lse_y = lse(y.data(), V);
    double want_kl = 0;
    for (std::int64_t v = 0; v < V; ++v) want_kl += std::exp(x[v] - lse_x) * ((x[v] - lse_x) - (y[v] - lse_y));
    close("logp of a softcap", logps[i], x[labels[i]] - lse_x, 8e-6);
    close("kl of a softcap", kl[i], want_kl, 8e-6);
    for (std::int64_t v = 0; v < V; ++v) {
      const double log_p = x[v] - lse_x, p = std::exp(log_p), gap = log_p - (y[v] - lse_y) - want_kl;
      const double want = slope[v] * ((v == labels[i]) - p + p * gap + dlse[i] * p);
      close("dlogits of a softcap", to_double(dz.row(i)[v]), want, 4e-5 + 2 * half);
    }
    for (std::int64_t v = V; v < V + padding; ++v) close("dlogits of padding", to_double(dz.row(i)[v]), 0, 0);
  }
  const KlLossFwdArgs loss{.z = z.rows,
                           .r = r.rows,
                           .dz = z.rows,
                           .of_z = of_z,
                           .of_r = of_r,
                           .N = N,
                           .V = V,
                           .padding = padding,
                           .weighted_kl = weighted.data()};
  kl_loss_fwd(loss, 0, N);  // in place
  for (std::int64_t i = 0; i < N; ++i) close("loss of a softcap", weighted[i], kl[i], 1e-6);
}

// The reverse KL and a JSD.
template <class T, class R>
void check_mixture(DType dtype_z, DType dtype_r, std::int64_t V, std::int64_t lead, double mixture) {
  const std::int64_t N = 6;
  const Block<T> z(2, 3, V, lead, lead, dtype_z, 3.);
  const Block<R> r(2, 3, V, 1, lead, dtype_r, 3.);
  Block<T> dz(2, 3, V, 0, lead, dtype_z, 3.);
  const std::unique_ptr<bool[]> mask(new bool[N]{true, false, true, true, true, false});
  const std::vector<float> ones(N, 1);
  std::vector<float> kl(N, NAN), stats(5 * N, NAN), kls(2 * N, NAN);
  std::vector<double> weighted(N);
  const TokenStatsFwdArgs fwd{.z = z.rows,
                              .r = r.rows,
                              .labels = nullptr,
                              .mask = mask.get(),
                              .N = N,
                              .V = V,
                              .ignore_index = -100,
                              .mixture = mixture,
                              .logps = nullptr,
                              .kl = kl.data(),
                              .stats = stats.data()};
  token_stats_fwd(fwd, 0, N);
  if (mixture < 1) {
    const MixtureKlArgs sums{.z = z.rows,
                             .r = r.rows,
                             .mask = mask.get(),
                             .N = N,
                             .V = V,
                             .mixture = mixture,
                             .stats = stats.data(),
                             .kls = kls.data()};
    mixture_kl(sums, 0, N);
  }
  const TokenStatsBwdArgs bwd{.z = z.rows,
                              .r = r.rows,
                              .dz = dz.rows,
                              .labels = nullptr,
                              .mask = mask.get(),
                              .N = N,
                              .V = V,
                              .ignore_index = -100,
                              .mixture = mixture,
                              .dkl = ones.data(),
                              .kl = kl.data(),
                              .stats = stats.data()};
  token_stats_bwd(bwd, 0, N * parts_of_row(dtype_z, V));
  const double half = sizeof(T) == 2 ? 0x1p-8 : 0;
  for (std::int64_t i = 0; i < N; ++i) {
    const double lse_z = lse(z.row(i), V), lse_r = lse(r.row(i), V);
    const auto log_p = [&](std::int64_t v) { return to_double(z.row(i)[v]) - lse_z; };
    const auto log_q = [&](std::int64_t v) { return to_double(r.row(i)[v]) - lse_r; };
    const auto log_m = [&](std::int64_t v) {
      return std::log(mixture * std::exp(log_p(v)) + (1 - mixture) * std::exp(log_q(v)));
    };
    double reverse = 0, of_policy = 0, of_ref = 0;
    for (std::int64_t v = 0; v < V; ++v) {
      reverse += std::exp(log_q(v)) * (log_q(v) - log_p(v));
      of_policy += std::exp(log_p(v)) * (log_p(v) - log_m(v));
      of_ref += std::exp(log_q(v)) * (log_q(v) - log_m(v));
    }
    const double want = mixture == 1 ? reverse : mixture * of_policy + (1 - mixture) * of_ref;
    close("divergence", kl[i], mask[i] ? want : 0, 8e-6);
    if (mixture < 1) close("kl to the mixture", kls[i], mask[i] ? of_policy : 0, 8e-6);
    if (mixture < 1) close("kl of the reference", kls[N + i], mask[i] ? of_ref : 0, 8e-6);
    for (std::int64_t v = 0; v < V; ++v) {
      const double p = std::exp(log_p(v));
      const double slope = mixture == 1 ? p - std::exp(log_q(v)) : mixture * p * (log_p(v) - log_m(v) - of_policy);
      close("gradient of a divergence", to_double(dz.row(i)[v]), mask[i] ? slope : 0, 2e-5 + half);
    }
  }
  const KlLossFwdArgs loss{.z = z.rows,
                           .r = r.rows,
                           .dz = z.rows,
                           .row_weight = ones.data(),
                           .N = N,
                           .V = V,
                           .mixture = mixture,
                           .weighted_kl = weighted.data()};
  kl_loss_fwd(loss, 0, N);  // in place
  for (std::int64_t i = 0; i < N; ++i)
    if (mask[i]) close("loss of a divergence", weighted[i], kl[i], 1e-6);
}

template <class T, class R>
void check_shapes(DType z, DType r) {
  for (const std::int64_t V : {std::int64_t{1}, std::int64_t{31}, std::int64_t{64}, std::int64_t{4097}, kPart + 5})
    for (const std::int64_t lead : {0, 1})
      for (const double mixture : {1., .25}) check_mixture<T, R>(z, r, V, lead, mixture);
  for (const std::int64_t V : {1, 3, 15, 16, 31, 33, 64, 1000, 4097})
    for (const std::int64_t padding : {0, 1, 40}) check_transformed<T, R>(z, r, V, padding);
  check_transformed<T, R>(z, r, kPart + 5, 3);
  for (const std::int64_t V : {1, 3, 15, 16, 17, 63, 64, 65, 127, 511, 513, 4095, 4096, 4097, 9000})
    for (const std::int64_t lead : {0, 1, 3}) check<T, R>(z, r, V, lead, lead, lead == 3 ? 40. : 3.);
  for (const std::int64_t V : {kPart - 1, kPart, kPart + 1, 2 * kPart + 70}) check<T, R>(z, r, V, 1, 1, 3.);
}

}  // namespace

int main() {
  for (int i = 0; i < kSimdLevels; ++i) {
    const auto level = static_cast<SimdLevel>(i);
    if (!simd_level_supported(level)) continue;
    set_simd_level(level);
    reset_rows_executed();
    check_shapes<float, float>(DType::f32, DType::f32);
    check_shapes<bf16, bf16>(DType::bf16, DType::bf16);
    check_shapes<f16, f16>(DType::f16, DType::f16);
    check_shapes<bf16, float>(DType::bf16, DType::f32);
    check_shapes<float, f16>(DType::f32, DType::f16);
    require(rows_executed(level) > 0, kSimdLevelNames[i], 0, 1);
    std::printf("ok %s\n", kSimdLevelNames[i]);
  }
}
