// Compares the emulated CUDA row ops with plain double arithmetic, on aligned, misaligned, offset and sliced rows in
// buffers without a spare element. The tests with sanitizers and with planted bugs run this program. tests/test_ops.py
// checks accuracy. Prints "ok" or the first wrong value.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "cuda/row_ops_impl.cuh"

#if !defined(SPO_TYPES)
#define SPO_TYPES SPO_TYPE(float, f32) SPO_TYPE(bf16, bf16) SPO_TYPE(f16, f16) SPO_TYPE(double, f64)
#endif

using namespace spo;
using cuda::bf16;
using cuda::f16;

namespace {

constexpr std::int64_t kIgnore = -100;

void close(const char* what, double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance) return;
  std::printf("%s is off: got %.9g, want %.9g\n", what, got, want);
  std::fflush(stdout);
  std::abort();
}

// Rows [B * T, V] in one allocation, with `lead` elements before the first row and none after the last.
template <class T>
struct Block {
  std::unique_ptr<T[]> data;
  Rows rows;
  std::int64_t lead;
  Block(std::int64_t B, std::int64_t steps, std::int64_t V, std::int64_t pad, std::int64_t lead, DType dtype)
      : lead(lead) {
    static std::mt19937 generator(1);
    std::normal_distribution<float> normal(0, 3);
    const std::int64_t stride = V + pad, n = lead + stride * (B * steps - 1) + V;
    data.reset(new T[n]);
    for (std::int64_t i = 0; i < n; ++i) cuda::from_acc(cuda::Acc<T>(normal(generator)), data[i]);
    rows = {data.get() + lead, dtype, steps, stride * steps, stride};
  }
  const T* row(std::int64_t i) const { return data.get() + lead + i * rows.stride_t; }
};

template <class T>
double lse(const T* z, std::int64_t V) {
  double sum = 0;
  for (std::int64_t v = 0; v < V; ++v) sum += std::exp(double(cuda::to_acc(z[v])));
  return std::log(sum);
}

// Which option of the rows check() sets: none, a softcap of the policy and a factor of the reference, or the columns
// after V of the gradient.
enum class Option { none, transforms, padding };

template <class T>
void check(DType dtype, std::int64_t V, std::int64_t pad, std::int64_t lead, int multiprocessors, Option option) {
  using A = cuda::Acc<T>;
  constexpr std::int64_t B = 2, steps = 2, N = B * steps;
  const Block<T> z(B, steps, V, pad, lead, dtype), r(B, steps, V, pad + lead, lead + 1, dtype);
  const std::int64_t padding = option == Option::padding ? 5 + lead : 0;
  Block<T> dz(B, steps, V + padding, lead, lead, dtype);
  const std::unique_ptr<std::int64_t[]> labels(new std::int64_t[N]{0, V - 1, kIgnore, V / 2});
  const std::unique_ptr<bool[]> mask(new bool[N]{true, false, true, true});
  const std::unique_ptr<A[]> logps(new A[N]), kl(new A[N]), stats(new A[4 * N]), loss(new A[1]), half(new A[1]{0.5});
  const std::unique_ptr<A[]> dlogps(new A[N]{-1.5, -1.5, -1.5, -1.5}), dkl(new A[N]{0.75, 0.75, 0.75, 0.75});
  const std::unique_ptr<A[]> dlse(new A[N]{0.5, 0.5, 0.5, 0.5});
  const std::unique_ptr<A[]> softcap(new A[2 * N]{0.25, 0.25, 0.5, -0.5, 4, 3, 2, 3}), factor(new A[1]{0.75});
  Transform of_z, of_r;
  if (option == Option::transforms) {
    of_z = {.a = softcap.get(), .b = softcap.get() + N, .stride = 1};
    of_r = {.a = factor.get(), .b = nullptr, .stride = 0};
  }
  const std::unique_ptr<double[]> weighted(new double[N]);
  const bool deterministic = multiprocessors == 0;
  const std::int64_t bytes = cuda::TypedOps<T>::workspace_bytes(true, N, V, multiprocessors, deterministic);
  const std::unique_ptr<A[]> workspace(new A[bytes / sizeof(A)]);
  const cuda::LaunchContext context{nullptr, multiprocessors, deterministic, workspace.get()};

  const TokenStatsFwdArgs fwd{.z = z.rows,
                              .r = r.rows,
                              .of_z = of_z,
                              .of_r = of_r,
                              .labels = labels.get(),
                              .mask = mask.get(),
                              .N = N,
                              .V = V,
                              .ignore_index = kIgnore,
                              .logps = logps.get(),
                              .kl = kl.get(),
                              .stats = stats.get()};
  cuda::TypedOps<T>::launch_token_stats_fwd(fwd, context);
  const TokenStatsBwdArgs bwd{.z = z.rows,
                              .r = r.rows,
                              .dz = dz.rows,
                              .of_z = of_z,
                              .of_r = of_r,
                              .labels = labels.get(),
                              .mask = mask.get(),
                              .N = N,
                              .V = V,
                              .padding = padding,
                              .ignore_index = kIgnore,
                              .dlogps = dlogps.get(),
                              .dkl = dkl.get(),
                              .dlse = dlse.get(),
                              .kl = kl.get(),
                              .stats = stats.get()};
  cuda::TypedOps<T>::launch_token_stats_bwd(bwd, context);

  const double exact = sizeof(A) == 8 ? 1e-9 : 2e-5, rounding = sizeof(T) == 2 ? 0x1p-8 : exact;
  double total = 0;
  const std::unique_ptr<double[]> z_row(new double[V]), r_row(new double[V]), slope(new double[V]);
  for (std::int64_t i = 0; i < N; ++i) {
    for (std::int64_t v = 0; v < V; ++v) {
      z_row[v] = cuda::to_acc(z.row(i)[v]), r_row[v] = cuda::to_acc(r.row(i)[v]), slope[v] = 1;
      if (option != Option::transforms) continue;
      const double a = softcap[i], b = softcap[N + i], t = std::tanh(a * z_row[v]);
      z_row[v] = b * t, slope[v] = a * b * (1 - t * t), r_row[v] *= factor[0];
    }
    const double lse_z = lse(z_row.get(), V), lse_r = lse(r_row.get(), V);
    const auto log_p = [&](std::int64_t v) { return z_row[v] - lse_z; };
    const auto gap = [&](std::int64_t v) { return log_p(v) - (r_row[v] - lse_r); };
    double want_kl = 0;
    for (std::int64_t v = 0; v < V; ++v) want_kl += std::exp(log_p(v)) * gap(v);
    total += 0.75 * want_kl;
    const bool with_logp = labels[i] != kIgnore;
    close("logp", logps[i], with_logp ? log_p(labels[i]) : 0, exact);
    close("kl", kl[i], mask[i] ? want_kl : 0, exact);
    for (std::int64_t v = 0; v < V; ++v) {
      const double p = std::exp(log_p(v));
      const double want =
          (with_logp ? -1.5 * ((v == labels[i]) - p) : 0) + (mask[i] ? 0.75 * p * (gap(v) - want_kl) : 0) + 0.5 * p;
      close("dlogits", cuda::to_acc(dz.row(i)[v]), slope[v] * want, 2 * rounding);
    }
    for (std::int64_t v = V; v < V + padding; ++v) close("padding", cuda::to_acc(dz.row(i)[v]), 0, 0);
  }
  const std::unique_ptr<A[]> kls(new A[2 * N]), jsd_stats(new A[5 * N]);
  const MixtureKlArgs mixture_kl{.z = z.rows,
                                 .r = r.rows,
                                 .of_z = of_z,
                                 .of_r = of_r,
                                 .mask = mask.get(),
                                 .N = N,
                                 .V = V,
                                 .mixture = 0.25,
                                 .stats = stats.get(),
                                 .kls = kls.get()};
  cuda::TypedOps<T>::launch_mixture_kl(mixture_kl, context);
  std::copy(stats.get(), stats.get() + 4 * N, jsd_stats.get());
  std::copy(kls.get(), kls.get() + N, jsd_stats.get() + 4 * N);
  for (const double mixture : {1., .25}) {
    TokenStatsBwdArgs of_mixture = bwd;
    of_mixture.mixture = mixture;
    of_mixture.stats = jsd_stats.get();
    cuda::TypedOps<T>::launch_token_stats_bwd(of_mixture, context);
    for (std::int64_t i = 0; i < N; ++i) {
      for (std::int64_t v = 0; v < V; ++v) {
        z_row[v] = cuda::to_acc(z.row(i)[v]), r_row[v] = cuda::to_acc(r.row(i)[v]), slope[v] = 1;
        if (option != Option::transforms) continue;
        const double a = softcap[i], b = softcap[N + i], t = std::tanh(a * z_row[v]);
        z_row[v] = b * t, slope[v] = a * b * (1 - t * t), r_row[v] *= factor[0];
      }
      const double lse_z = lse(z_row.get(), V), lse_r = lse(r_row.get(), V);
      const auto log_p = [&](std::int64_t v) { return z_row[v] - lse_z; };
      const auto log_q = [&](std::int64_t v) { return r_row[v] - lse_r; };
      const auto log_m = [&](std::int64_t v) {
        return std::log(mixture * std::exp(log_p(v)) + (1 - mixture) * std::exp(log_q(v)));
      };
      double of_policy = 0, of_ref = 0;
      for (std::int64_t v = 0; v < V; ++v) {
        of_policy += std::exp(log_p(v)) * (log_p(v) - log_m(v));
        of_ref += std::exp(log_q(v)) * (log_q(v) - log_m(v));
      }
      if (mixture < 1) close("kl to the mixture", kls[i], mask[i] ? of_policy : 0, exact);
      if (mixture < 1) close("kl of the reference", kls[N + i], mask[i] ? of_ref : 0, exact);
      const bool with_logp = labels[i] != kIgnore;
      for (std::int64_t v = 0; v < V; ++v) {
        const double p = std::exp(log_p(v));
        const double of_kl = mixture == 1 ? p - std::exp(log_q(v)) : mixture * p * (log_p(v) - log_m(v) - of_policy);
        const double want = (with_logp ? -1.5 * ((v == labels[i]) - p) : 0) + (mask[i] ? 0.75 * of_kl : 0) + 0.5 * p;
        close("gradient of a divergence", cuda::to_acc(dz.row(i)[v]), slope[v] * want, 2 * rounding);
      }
    }
  }
  const KlLossFwdArgs kl_loss{.z = z.rows,
                              .r = r.rows,
                              .dz = dz.rows,
                              .of_z = of_z,
                              .of_r = of_r,
                              .row_weight = dkl.get(),
                              .N = N,
                              .V = V,
                              .padding = padding,
                              .weighted_kl = weighted.get()};
  cuda::TypedOps<T>::launch_kl_loss_fwd(kl_loss, loss.get(), context);
  close("loss", loss[0], total, 10 * exact);
  const double before = cuda::to_acc(dz.row(N - 1)[V - 1]);
  cuda::TypedOps<T>::launch_scale(dz.rows, N, V, half.get(), context);
  close("scaled", cuda::to_acc(dz.row(N - 1)[V - 1]), before / 2, rounding);
}

// Checks kl_loss in clusters that take several rows each: every KL and gradient, rows of weight 0, each row alone and
// in place, and the KL of equal rows.
template <class T>
void check_clusters(DType dtype, std::int64_t V, int blocks, int threads) {
  using A = cuda::Acc<T>;
  if constexpr (std::is_same_v<A, double>) {
    return;
  } else {
    constexpr std::int64_t N = 8;
    const cuda::SharedMemory memory{232448};
    const Block<T> z(2, N / 2, V, 16, 0, dtype), r(2, N / 2, V, 8, 8, dtype);
    Block<T> dz(2, N / 2, V, 0, 0, dtype), alone(1, 1, V, 0, 0, dtype);
    const std::unique_ptr<A[]> weight(new A[N]{0.75, -0.5, 0, 1, 0.75, 0, 2, 1});
    const std::unique_ptr<double[]> weighted(new double[N]), weighted_alone(new double[1]);
    const cuda::ClusterConfig config = cuda::cluster_of(V, sizeof(T), blocks, threads);
    const auto run = [&](const KlLossFwdArgs& a) {
      bool launched = false;
      cuda::launch_kl_loss_cluster<T>(a, config, memory, nullptr, launched);
      close("launched", launched, 1, 0);
    };
    const auto args = [&](const Rows& z, const Rows& r, const Rows& dz, const A* weight, std::int64_t N, double* kl) {
      return KlLossFwdArgs{.z = z,
                           .r = r,
                           .dz = dz,
                           .of_z = {},
                           .of_r = {},
                           .row_weight = weight,
                           .N = N,
                           .V = V,
                           .padding = 0,
                           .weighted_kl = kl};
    };
    run(args(z.rows, r.rows, dz.rows, weight.get(), N, weighted.get()));
    const double exact = 2e-5, rounding = sizeof(T) == 2 ? 0x1p-8 : exact;
    for (std::int64_t i = 0; i < N; ++i) {
      const double lse_z = lse(z.row(i), V), lse_r = lse(r.row(i), V);
      const auto log_p = [&](std::int64_t v) { return double(cuda::to_acc(z.row(i)[v])) - lse_z; };
      const auto gap = [&](std::int64_t v) { return log_p(v) - (double(cuda::to_acc(r.row(i)[v])) - lse_r); };
      double kl = 0;
      for (std::int64_t v = 0; v < V; ++v) kl += std::exp(log_p(v)) * gap(v);
      close("weighted kl", weighted[i], weight[i] * kl, exact);
      for (std::int64_t v = 0; v < V; ++v)
        close("gradient", cuda::to_acc(dz.row(i)[v]), weight[i] * std::exp(log_p(v)) * (gap(v) - kl), 2 * rounding);
    }
    for (std::int64_t i = 0; i < N; ++i) {
      const auto same = [&](const T* row, double kl) {
        if (std::memcmp(row, dz.row(i), V * sizeof(T)) != 0 || kl != weighted[i]) close("the same row", kl, NAN, 0);
      };
      Rows z_row = z.rows, r_row = r.rows;
      z_row.data = const_cast<T*>(z.row(i)), r_row.data = const_cast<T*>(r.row(i));
      run(args(z_row, r_row, alone.rows, weight.get() + i, 1, weighted_alone.get()));
      same(alone.row(0), weighted_alone[0]);
      run(args(z_row, r_row, z_row, weight.get() + i, 1, weighted_alone.get()));
      same(z.row(i), weighted_alone[0]);
    }
    run(args(r.rows, r.rows, r.rows, nullptr, N, weighted.get()));
    for (std::int64_t i = 0; i < N; ++i) close("kl of equal rows", weighted[i], 0, 0);
  }
}

// On a device with clusters, a cluster takes every long row of whole aligned vectors, whatever the number of rows.
template <class T>
void check_choice(DType dtype) {
  constexpr std::int64_t V = 16384 / sizeof(T), N = 3;
  const Block<T> z(1, N, V, 0, 0, dtype), odd(1, N, V, 1, 1, dtype);
  Block<T> dz(1, N, V, 0, 0, dtype), odd_dz(1, N, V, 3, 0, dtype);
  const std::unique_ptr<double[]> weighted(new double[N]);
  cuda::Acc<T> loss;
  const auto clusters_of = [&](const KlLossFwdArgs& a) {
    const long before = emulator::clusters_run;
    cuda::TypedOps<T>::launch_kl_loss_fwd(a, &loss, {nullptr, 16});
    return double(emulator::clusters_run - before);
  };
  const auto args = [&](const Rows& z, const Rows& r, const Rows& dz, std::int64_t N, std::int64_t V) {
    return KlLossFwdArgs{.z = z,
                         .r = r,
                         .dz = dz,
                         .of_z = {},
                         .of_r = {},
                         .row_weight = nullptr,
                         .N = N,
                         .V = V,
                         .padding = 0,
                         .weighted_kl = weighted.get()};
  };
  const auto clusters = [&](const Rows& z, const Rows& r, const Rows& dz, std::int64_t N, std::int64_t V) {
    return clusters_of(args(z, r, dz, N, V));
  };
  const bool can = sizeof(T) < 8;
  close("three rows in clusters", clusters(z.rows, z.rows, dz.rows, N, V), can ? 3 : 0, 0);
  close("a row in a cluster", clusters(z.rows, z.rows, dz.rows, 1, V), can ? 1 : 0, 0);
  close("a short row", clusters(z.rows, z.rows, dz.rows, N, V - 16), 0, 0);
  close("a row of no whole vectors", clusters(z.rows, z.rows, dz.rows, N, V - 1), 0, 0);
  close("odd logits", clusters(odd.rows, z.rows, dz.rows, N, V), 0, 0);
  close("an odd reference", clusters(z.rows, odd.rows, dz.rows, N, V), 0, 0);
  close("an odd gradient, whose first row is aligned", clusters(z.rows, z.rows, odd_dz.rows, 1, V), 0, 0);
  if (can) {
    Rows other = z.rows;
    other.dtype = dtype == DType::f16 ? DType::bf16 : DType::f16;
    close("a reference of another type", clusters(z.rows, other, dz.rows, 1, V / 2), 0, 0);
  }
  KlLossFwdArgs other = args(z.rows, z.rows, dz.rows, 1, V);
  const cuda::Acc<T> a = 1;
  other.of_r = {.a = &a, .b = nullptr, .stride = 0};
  close("a transform", clusters_of(other), 0, 0);
  Block<T> wide(1, N, 2 * V, 0, 0, dtype);
  other = args(wide.rows, wide.rows, wide.rows, N, V);
  close("a part of a row", clusters_of(other), can ? 3 : 0, 0);
  other.padding = V;
  close("padding", clusters_of(other), 0, 0);
  emulator::capability = 80;
  close("a device without clusters", clusters(z.rows, z.rows, dz.rows, N, V), 0, 0);
  emulator::capability = 90;
}

}  // namespace

int main() {
  for (const std::int64_t V : {1, 7, 8, 9, 31, 255, 256, 257, 2049, 4111, 20000})
    for (const std::int64_t lead : {0, 1, 2, 3})
      for (const int multiprocessors : {0, 64}) {
        if (multiprocessors && V < 20000) continue;  // too short to be split
        for (const Option option : {Option::none, Option::transforms, Option::padding}) {
#define SPO_TYPE(T, name) check<T>(DType::name, V, lead % 2 ? 3 : 0, lead, multiprocessors, option);
          SPO_TYPES
#undef SPO_TYPE
        }
      }
  // Shares in which each warp has a piece, some warps have one, some have two, and the last block has less than others.
#define SPO_TYPE(T, name)                                                 \
  check_choice<T>(DType::name);                                           \
  check_clusters<T>(DType::name, 16 / sizeof(T) * 300, 1, 256);           \
  check_clusters<T>(DType::name, 16 / sizeof(T) * 2 * 1090, 2, 256);      \
  check_clusters<T>(DType::name, 16 / sizeof(T) * (3 * 513 - 2), 3, 512); \
  check_clusters<T>(DType::name, 16 / sizeof(T) * (8 * 129 - 7), 8, 256);
  SPO_TYPES
#undef SPO_TYPE
  std::printf("ok\n");
}
