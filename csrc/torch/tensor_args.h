// From tensors to the arguments of the row ops, for every compiled backend: checks, and outputs. Each *Call owns the
// outputs that it allocates, and the per-row inputs and transforms, made contiguous. The caller keeps logits,
// ref_logits and dlogits alive, to which the args point too.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../op_args.h"

namespace spo {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

// The name that Python has for a dtype.
inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another dtype";
  }
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, got ", dtype_name(t.scalar_type()));
  }
}

inline ScalarType acc_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

inline Rows rows_of(const Tensor& t, const char* name, bool writable) {
  STD_TORCH_CHECK(t.dim() == 2 || t.dim() == 3, name, " must be [N, V] or [B, T, V], got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.size(-1) >= 1, name, " must have V >= 1, got V = ", t.size(-1));
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, name, " must have a unit last stride, got ", t.stride(-1));
  Rows rows;
  rows.data = writable ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  rows.dtype = dtype_of(t, name);
  rows.stride_b = t.stride(0);
  if (t.dim() == 2) return rows;
  const int64_t T = t.size(1), stride_t = t.stride(1);
  if (t.stride(0) == T * stride_t) {  // evenly spaced rows need no division
    rows.stride_b = stride_t;
  } else {
    rows.T = std::max<int64_t>(T, 1);
    rows.stride_t = stride_t;
  }
  return rows;
}

inline int64_t row_count(const Tensor& t) { return t.dim() == 3 ? t.size(0) * t.size(1) : t.size(0); }

// A GPU kernel that reads a pointer of another device destroys the process's CUDA context.
inline void require_device(const Tensor& t, const Tensor& like, const char* name, const char* like_name = "logits") {
  const auto device_text = [](const Tensor& x) {
    return x.is_cpu() ? std::string("cpu") : "device " + std::to_string(x.get_device_index());
  };
  STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), name, " must be on ",
                  device_text(like), " like ", like_name, ", got ", device_text(t));
}

// The tensor, or a contiguous copy, with `count` values about the rows of logits. A *Call keeps it alive.
inline Tensor row_values(const Tensor& t, const Tensor& logits, ScalarType dtype, int64_t count, const char* name) {
  require_device(t, logits, name);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype_name(dtype), ", got ",
                  dtype_name(t.scalar_type()));
  STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " elements for logits of ", row_count(logits),
                  " rows, got ", t.numel());
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline OptionalTensor row_values(const OptionalTensor& t, const Tensor& logits, ScalarType dtype, int64_t count,
                                 const char* name) {
  if (!t.has_value()) return std::nullopt;
  return row_values(*t, logits, dtype, count, name);
}
template <class T>
const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

// How the logits come from the tensors: spo_kernels.reference.RowOptions.
struct RowOptions {
  const OptionalInt& vocab_size;
  const OptionalTensor &transform, &ref_transform;
  double mixture;
};

inline Rows ref_rows(const OptionalTensor& ref_logits, const Tensor& logits, const RowOptions& options) {
  if (!ref_logits.has_value()) return {};
  require_device(*ref_logits, logits, "ref_logits");
  const Rows rows = rows_of(*ref_logits, "ref_logits", false);
  bool same = ref_logits->dim() == logits.dim();
  const int64_t compared = options.vocab_size ? logits.dim() - 1 : logits.dim();
  for (int64_t d = 0; same && d < compared; ++d) same = ref_logits->size(d) == logits.size(d);
  STD_TORCH_CHECK(same, "ref_logits must be ", shape_text(logits), " like logits, got ", shape_text(*ref_logits));
  STD_TORCH_CHECK((rows.dtype == DType::f64) == (dtype_of(logits, "logits") == DType::f64),
                  "ref_logits must be float64 exactly when logits are, got ", dtype_name(ref_logits->scalar_type()),
                  " for logits in ", dtype_name(logits.scalar_type()));
  return rows;
}

inline std::vector<int64_t> row_shape(const Tensor& logits) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) shape.push_back(logits.size(d));
  return shape;
}

// An uninitialized, contiguous tensor on the device of `like`. torch::stable::new_empty would go through the
// dispatcher, which costs 0.6 us more.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_contiguous_like(const Tensor& t) {
  std::vector<int64_t> shape = row_shape(t);
  shape.push_back(t.size(-1));
  return empty(t, shape, t.scalar_type());
}

inline int64_t columns_read(const Tensor& logits, const OptionalTensor& ref_logits, const RowOptions& options) {
  if (!options.vocab_size) return logits.size(-1);
  const int64_t V = *options.vocab_size;
  STD_TORCH_CHECK(V >= 1 && V <= logits.size(-1), "vocab_size must be in [1, ", logits.size(-1), "], got ", V);
  STD_TORCH_CHECK(!ref_logits || V <= ref_logits->size(-1), "ref_logits must have at least ", V, " columns, got ",
                  ref_logits ? ref_logits->size(-1) : 0);
  return V;
}

// A transform [1 or 2, 1 or N], or a contiguous copy. A *Call keeps it alive.
inline OptionalTensor transform_values(const OptionalTensor& t, const Tensor& logits, ScalarType acc, int64_t N,
                                       const char* name) {
  if (!t.has_value()) return std::nullopt;
  require_device(*t, logits, name);
  const bool fits = t->dim() == 2 && (t->size(0) == 1 || t->size(0) == 2) && (t->size(1) == 1 || t->size(1) == N);
  STD_TORCH_CHECK(fits && t->scalar_type() == acc, name, " must be [1 or 2, 1 or ", N, "] ", dtype_name(acc), ", got ",
                  shape_text(*t), " ", dtype_name(t->scalar_type()));
  return t->is_contiguous() ? *t : torch::stable::contiguous(*t);
}
inline Transform transform_of(const OptionalTensor& t) {
  if (!t.has_value()) return {};
  const auto* a = static_cast<const char*>(t->const_data_ptr());
  return {.a = a,
          .b = t->size(0) == 2 ? a + t->size(1) * static_cast<int64_t>(t->element_size()) : nullptr,
          .stride = t->size(1) > 1 ? 1 : 0};
}

// The part of a *Call that all ops over logits share. r.data is null without ref_logits.
struct RowInputs {
  int64_t N, V;
  double mixture;
  Rows z, r;
  ScalarType acc;
  OptionalTensor transform, ref_transform;

  RowInputs(const Tensor& logits, const OptionalTensor& ref_logits, const RowOptions& options)
      : N(row_count(logits)),
        V(columns_read(logits, ref_logits, options)),
        mixture(options.mixture),
        z(rows_of(logits, "logits", false)),
        r(ref_rows(ref_logits, logits, options)),
        acc(acc_type(z.dtype)),
        transform(transform_values(options.transform, logits, acc, N, "transform")),
        ref_transform(transform_values(options.ref_transform, logits, acc, N, "ref_transform")) {
    STD_TORCH_CHECK(mixture >= 0 && mixture <= 1, "mixture must be in [0, 1], got ", mixture);
  }

  // How many statistics a row has.
  int64_t stats_count() const { return r.data ? 4 + is_jsd(mixture) : 2; }
};

struct TokenStatsFwdCall : RowInputs {
  OptionalTensor labels, mask;
  Tensor logps, kl, stats;
  TokenStatsFwdArgs args;

  TokenStatsFwdCall(const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& ref_logits,
                    const OptionalTensor& mask, int64_t ignore_index, const RowOptions& options)
      : RowInputs(logits, ref_logits, options),
        labels(row_values(labels, logits, ScalarType::Long, N, "labels")),
        mask(row_values(mask, logits, ScalarType::Bool, N, "mask")) {
    const std::vector<int64_t> rows = row_shape(logits), none{0};
    std::vector<int64_t> stats_shape{stats_count()};
    stats_shape.insert(stats_shape.end(), rows.begin(), rows.end());
    logps = empty(logits, labels ? rows : none, acc);
    kl = empty(logits, ref_logits ? rows : none, acc);
    stats = empty(logits, stats_shape, acc);
    args = {.z = z,
            .r = r,
            .of_z = transform_of(transform),
            .of_r = transform_of(ref_transform),
            .labels = data_or_null<int64_t>(this->labels),
            .mask = data_or_null<bool>(this->mask),
            .N = N,
            .V = V,
            .ignore_index = ignore_index,
            .mixture = mixture,
            .logps = logps.mutable_data_ptr(),
            .kl = kl.mutable_data_ptr(),
            .stats = stats.mutable_data_ptr()};
  }
};

struct TokenStatsBwdCall : RowInputs {
  OptionalTensor dlogps, dkl, dlse, labels, mask;
  Tensor kl, stats;
  TokenStatsBwdArgs args;

  TokenStatsBwdCall(const Tensor& dlogits, const OptionalTensor& dlogps, const OptionalTensor& dkl,
                    const OptionalTensor& dlse, const Tensor& logits, const OptionalTensor& labels,
                    const OptionalTensor& ref_logits, const OptionalTensor& mask, const Tensor& kl, const Tensor& stats,
                    int64_t ignore_index, const RowOptions& options)
      : RowInputs(logits, ref_logits, options),
        dlogps(row_values(dlogps, logits, acc, N, "dlogps")),
        dkl(row_values(dkl, logits, acc, N, "dkl")),
        dlse(row_values(dlse, logits, acc, N, "dlse")),
        labels(row_values(labels, logits, ScalarType::Long, N, "labels")),
        mask(row_values(mask, logits, ScalarType::Bool, N, "mask")),
        kl(row_values(kl, logits, acc, r.data ? N : 0, "kl")),
        stats(row_values(stats, logits, acc, stats_count() * N, "stats")) {
    STD_TORCH_CHECK(!dlogps || labels, "dlogps needs labels");
    STD_TORCH_CHECK(!dkl || ref_logits, "dkl needs ref_logits");
    args = {.z = z,
            .r = r,
            .dz = rows_of(dlogits, "dlogits", true),
            .of_z = transform_of(transform),
            .of_r = transform_of(ref_transform),
            .labels = data_or_null<int64_t>(this->labels),
            .mask = data_or_null<bool>(this->mask),
            .N = N,
            .V = V,
            .padding = dlogits.size(-1) - V,
            .ignore_index = ignore_index,
            .mixture = mixture,
            .dlogps = data_or_null<void>(this->dlogps),
            .dkl = data_or_null<void>(this->dkl),
            .dlse = data_or_null<void>(this->dlse),
            .kl = this->kl.const_data_ptr(),
            .stats = this->stats.const_data_ptr()};
  }
};

// The caller sets args.weighted_kl, to memory on the device of logits.
struct KlLossFwdCall : RowInputs {
  OptionalTensor row_weight;
  KlLossFwdArgs args;

  KlLossFwdCall(const Tensor& dlogits, const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& row_weight,
                const RowOptions& options)
      : RowInputs(logits, ref_logits, options), row_weight(row_values(row_weight, logits, acc, N, "row_weight")) {
    args = {.z = z,
            .r = r,
            .dz = rows_of(dlogits, "dlogits", true),
            .of_z = transform_of(transform),
            .of_r = transform_of(ref_transform),
            .row_weight = data_or_null<void>(this->row_weight),
            .N = N,
            .V = V,
            .padding = dlogits.size(-1) - V,
            .mixture = mixture,
            .weighted_kl = nullptr};
  }
};

struct MixtureKlCall : RowInputs {
  OptionalTensor mask;
  Tensor stats, kls;
  MixtureKlArgs args;

  MixtureKlCall(const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& mask, const Tensor& stats,
                const RowOptions& options)
      : RowInputs(logits, ref_logits, options),
        mask(row_values(mask, logits, ScalarType::Bool, N, "mask")),
        stats(row_values(stats, logits, acc, (stats.size(0) == 5 ? 5 : 4) * N, "stats")) {
    STD_TORCH_CHECK(is_jsd(mixture), "mixture must be in (0, 1), got ", mixture);
    std::vector<int64_t> shape = row_shape(logits);
    shape.insert(shape.begin(), 2);
    kls = empty(logits, shape, acc);
    args = {.z = z,
            .r = r,
            .of_z = transform_of(transform),
            .of_r = transform_of(ref_transform),
            .mask = data_or_null<bool>(this->mask),
            .N = N,
            .V = V,
            .mixture = mixture,
            .stats = this->stats.const_data_ptr(),
            .kls = kls.mutable_data_ptr()};
  }
};

// The rows that scale_ scales, after checks of its arguments.
inline Rows scale_rows(const Tensor& tensor, const Tensor& scale) {
  require_device(scale, tensor, "scale", "tensor");
  STD_TORCH_CHECK(scale.numel() == 1, "scale must have one element, got ", scale.numel());
  const Rows rows = rows_of(tensor, "tensor", true);
  STD_TORCH_CHECK(scale.scalar_type() == acc_type(rows.dtype), "scale must be ", dtype_name(acc_type(rows.dtype)),
                  " for a tensor in ", dtype_name(tensor.scalar_type()), ", got ", dtype_name(scale.scalar_type()));
  return rows;
}

}  // namespace spo
