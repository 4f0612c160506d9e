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
  const TokenStatsFwdArgs fwd{z.rows, r.rows, labels.data(), mask.get(), N,
                              V,      ignore, logps.data(),  kl.data(),  stats.data()};
  token_stats_fwd(fwd, 0, N);
  Block<T> dz(B, steps, V, pad, lead, dtype_z, spread);
  TokenStatsBwdArgs bwd{z.rows, r.rows, dz.rows,       labels.data(), mask.get(), N,
                        V,      ignore, dlogps.data(), dkl.data(),    kl.data(),  stats.data()};
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
  KlLossFwdArgs loss{z.rows, r.rows, dz.rows, dkl.data(), N, V, weighted.data()};
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

template <class T, class R>
void check_shapes(DType z, DType r) {
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
