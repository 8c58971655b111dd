// What the operators of registration.cpp ask of their arguments: everything that a kernel presumes
// of memory it touches. Kernels trust shapes, dtypes, strides, row numbers and set numbers; a call
// that breaks one throws before any is entered.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace reft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

constexpr int64_t kMaxRank = 256;  // kernels hold one row's coefficients in arrays of this size

inline bool has_sizes(const Tensor& tensor, Sizes sizes) {
  if (tensor.dim() != int64_t(sizes.size())) return false;
  int64_t i = 0;
  for (int64_t size : sizes)
    if (tensor.sizes()[i++] != size) return false;
  return true;
}

inline std::string text(Sizes sizes) {
  std::string out = "[";
  for (int64_t size : sizes) out += (out.size() > 1 ? ", " : "") + std::to_string(size);
  return out + "]";
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// The dtype of sums over `dtype`.
inline ScalarType sum_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_sizes(const char* name, const Tensor& tensor, Sizes sizes) {
  STD_TORCH_CHECK(has_sizes(tensor, sizes), "reft_kernels_cpu: ", name, ": expected shape ",
                  text(sizes));
}

// A contiguous tensor of one dtype.
inline void check_dense(const char* name, const Tensor& tensor, Sizes sizes, ScalarType dtype) {
  check_sizes(name, tensor, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "reft_kernels_cpu: ", name, ": wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), "reft_kernels_cpu: ", name,
                  ": expected a contiguous tensor");
}
inline void check_dense(const char* name, const Optional& tensor, Sizes sizes, ScalarType dtype) {
  if (tensor) check_dense(name, *tensor, sizes, dtype);
}

// A weight: contiguous, of any of the dtypes.
inline void check_weight(const char* name, const Tensor& tensor, Sizes sizes) {
  STD_TORCH_CHECK(is_floating(tensor.scalar_type()), "reft_kernels_cpu: ", name,
                  ": expected float32, float64, bfloat16 or float16");
  check_dense(name, tensor, sizes, tensor.scalar_type());
}
inline void check_weight(const char* name, const Optional& tensor, Sizes sizes) {
  if (tensor) check_weight(name, *tensor, sizes);
}

// Whether each row's channels are consecutive.
inline bool has_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.sizes()[1] <= 1 || tensor.sizes()[0] == 0;
}

// Rows [count, d] of one dtype with consecutive channels; those that are written to lie apart.
inline void check_rows(const char* name, const Tensor& tensor, Sizes sizes, ScalarType dtype,
                       bool written) {
  check_sizes(name, tensor, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "reft_kernels_cpu: ", name, ": wrong dtype");
  STD_TORCH_CHECK(has_rows(tensor), "reft_kernels_cpu: ", name, ": expected consecutive channels");
  STD_TORCH_CHECK(!written || tensor.sizes()[0] <= 1 || tensor.stride(0) >= tensor.sizes()[1],
                  "reft_kernels_cpu: ", name, ": expected rows that share no memory");
}
inline void check_rows(const char* name, const Optional& tensor, Sizes sizes, ScalarType dtype,
                       bool written) {
  if (tensor) check_rows(name, *tensor, sizes, dtype, written);
}

inline void check_hidden(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.sizes()[1] >= 1, "reft_kernels_cpu: ", name,
                  ": expected [M, d] with d >= 1");
  STD_TORCH_CHECK(is_floating(tensor.scalar_type()), "reft_kernels_cpu: ", name,
                  ": expected float32, float64, bfloat16 or float16");
  check_rows(name, tensor, {tensor.sizes()[0], tensor.sizes()[1]}, tensor.scalar_type(), false);
}

// int32 entries, each in [low, high).
inline void check_numbers(const char* name, const Optional& tensor, int64_t length, int64_t low,
                          int64_t high) {
  if (!tensor) return;
  check_dense(name, *tensor, {length}, ScalarType::Int);
  const int32_t* entries = static_cast<const int32_t*>(tensor->data_ptr());
  bool inside = true;
  for (int64_t n = 0; n < length; ++n) inside &= entries[n] >= low && entries[n] < high;
  STD_TORCH_CHECK(inside, "reft_kernels_cpu: ", name, ": got a number outside [", low, ", ", high,
                  ")");
}

// The entries of a call; returns how many.
inline int64_t check_selection(int64_t all_rows, const Optional& rows, const Optional& weight_ids,
                               int64_t sets) {
  int64_t count = all_rows;
  if (rows) {
    STD_TORCH_CHECK(rows->dim() == 1, "reft_kernels_cpu: rows: expected [N]");
    count = rows->sizes()[0];
    check_numbers("rows", rows, count, -1, all_rows);
  }
  check_numbers("weight_ids", weight_ids, count, 0, sets);
  return count;
}

// write [r, d], or [S, r, d] with weight_ids, beside hidden states of d channels.
inline void check_write(const Tensor& write, bool with_sets, int64_t d) {
  const int64_t dims = with_sets ? 3 : 2;
  STD_TORCH_CHECK(
      write.dim() == dims && write.sizes()[dims - 1] == d && (!with_sets || write.sizes()[0] >= 1),
      "reft_kernels_cpu: write: expected [r, d], or [S, r, d] with weight_ids, d = ", d);
  const int64_t r = write.sizes()[dims - 2];
  STD_TORCH_CHECK(r >= 1 && r <= kMaxRank, "reft_kernels_cpu: write: got rank ", r,
                  ", expected 1 to ", kMaxRank);
}

inline void check_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 6, "reft_kernels_cpu: activation: got ",
                  activation, ", expected 0 to 6");
}

// Sizes of the weights of an edit: sets is 1 and has no dimension of its own without weight_ids.
struct EditSizes {
  EditSizes(const Tensor& write, const Optional& weight_ids, int64_t channels)
      : with_sets(weight_ids.has_value()), d(channels) {
    check_write(write, with_sets, d);
    sets = with_sets ? write.sizes()[0] : 1;
    r = write.sizes()[with_sets ? 1 : 0];
  }
  template <class Check>
  void matrix(const Check& check) const {
    with_sets ? check(Sizes{sets, r, d}) : check(Sizes{r, d});
  }
  template <class Check>
  void vector(const Check& check) const {
    with_sets ? check(Sizes{sets, r}) : check(Sizes{r});
  }
  bool with_sets;
  int64_t sets = 1, r = 0, d;
};

inline void check_edit(const Tensor& source, const Tensor& out, const Optional& rows,
                       const Optional& weight_ids, const Optional& read, const Optional& read_bias,
                       const Tensor& write, const Optional& subtract_bias, const Optional& coeff,
                       int64_t activation, const Optional& saved_input, const Optional& u,
                       const Optional& z) {
  check_hidden("source", source);
  const int64_t all_rows = source.sizes()[0], d = source.sizes()[1];
  const ScalarType dtype = source.scalar_type(), sums = sum_dtype(dtype);
  check_rows("out", out, {all_rows, d}, dtype, true);
  check_activation(activation);
  const EditSizes sizes(write, weight_ids, d);
  sizes.matrix([&](Sizes s) { check_weight("write", write, s), check_weight("read", read, s); });
  sizes.vector([&](Sizes s) {
    check_weight("read_bias", read_bias, s), check_weight("subtract_bias", subtract_bias, s);
  });
  const int64_t count = check_selection(all_rows, rows, weight_ids, sizes.sets), r = sizes.r;
  check_weight("coeff", coeff, {count, r});
  check_rows("saved_input", saved_input, {count, d}, dtype, true);
  check_dense("u", u, {count, r}, sums);
  check_dense("z", z, {count, r}, sums);
}

inline void check_edit_backward(const Tensor& grad, const Optional& out, const Tensor& saved_input,
                                const Tensor& u, const Optional& z, const Optional& rows,
                                const Optional& weight_ids, const Optional& read,
                                const Tensor& write, const Optional& coeff,
                                bool subtract_projection, int64_t activation,
                                const Optional& grad_read, const Optional& grad_read_bias,
                                const Optional& grad_write, const Optional& grad_subtract_bias,
                                const Optional& grad_coeff) {
  check_hidden("grad", grad);
  const int64_t all_rows = grad.sizes()[0], d = grad.sizes()[1];
  const ScalarType dtype = grad.scalar_type(), sums = sum_dtype(dtype);
  check_rows("out", out, {all_rows, d}, dtype, true);
  check_activation(activation);
  const EditSizes sizes(write, weight_ids, d);
  sizes.matrix([&](Sizes s) {
    check_weight("write", write, s), check_weight("read", read, s);
    check_dense("grad_read", grad_read, s, sums), check_dense("grad_write", grad_write, s, sums);
  });
  sizes.vector([&](Sizes s) {
    check_dense("grad_read_bias", grad_read_bias, s, sums);
    check_dense("grad_subtract_bias", grad_subtract_bias, s, sums);
  });
  STD_TORCH_CHECK(!grad_write || !read || grad_read,
                  "reft_kernels_cpu: grad_read: expected beside grad_write and read");
  STD_TORCH_CHECK(grad_write || !(grad_read || grad_read_bias || grad_subtract_bias),
                  "reft_kernels_cpu: grad_write: expected beside the other gradients of weights");
  STD_TORCH_CHECK(
      subtract_projection || !grad_subtract_bias,
      "reft_kernels_cpu: grad_subtract_bias: expected none without subtract_projection");
  const int64_t count = check_selection(all_rows, rows, weight_ids, sizes.sets), r = sizes.r;
  check_weight("coeff", coeff, {count, r});
  check_dense("grad_coeff", grad_coeff, {count, r}, sums);
  STD_TORCH_CHECK(coeff || !grad_coeff,
                  "reft_kernels_cpu: grad_coeff: expected none without coeff");
  if (grad_write) check_rows("saved_input", saved_input, {count, d}, dtype, false);
  check_dense("u", u, {count, r}, sums);
  STD_TORCH_CHECK(activation == 0 || z, "reft_kernels_cpu: z: expected with an activation");
  if (activation != 0) check_dense("z", z, {count, r}, sums);
}

// scale [d], or [S, d] with weight_ids; returns S.
inline int64_t check_scale(const char* name, const Tensor& scale, const Optional& weight_ids,
                           int64_t d) {
  if (!weight_ids) return check_weight(name, scale, {d}), 1;
  STD_TORCH_CHECK(scale.dim() == 2 && scale.sizes()[0] >= 1, "reft_kernels_cpu: ", name,
                  ": expected [S, d] with weight_ids");
  return check_weight(name, scale, {scale.sizes()[0], d}), scale.sizes()[0];
}

inline void check_red(const Tensor& source, const Tensor& out, const Optional& rows,
                      const Optional& weight_ids, const Tensor& scale, const Tensor& bias,
                      const Optional& saved_input) {
  check_hidden("source", source);
  const int64_t all_rows = source.sizes()[0], d = source.sizes()[1];
  check_rows("out", out, {all_rows, d}, source.scalar_type(), true);
  const int64_t sets = check_scale("scale", scale, weight_ids, d);
  STD_TORCH_CHECK(check_scale("bias", bias, weight_ids, d) == sets,
                  "reft_kernels_cpu: bias: expected as many sets as in scale");
  const int64_t count = check_selection(all_rows, rows, weight_ids, sets);
  check_rows("saved_input", saved_input, {count, d}, source.scalar_type(), true);
}

inline void check_red_backward(const Tensor& grad, const Optional& out, const Tensor& saved_input,
                               const Optional& rows, const Optional& weight_ids,
                               const Tensor& scale, const Optional& grad_scale,
                               const Optional& grad_bias) {
  check_hidden("grad", grad);
  const int64_t all_rows = grad.sizes()[0], d = grad.sizes()[1];
  const ScalarType sums = sum_dtype(grad.scalar_type());
  check_rows("out", out, {all_rows, d}, grad.scalar_type(), true);
  const int64_t sets = check_scale("scale", scale, weight_ids, d);
  const int64_t count = check_selection(all_rows, rows, weight_ids, sets);
  STD_TORCH_CHECK(bool(grad_scale) == bool(grad_bias),
                  "reft_kernels_cpu: grad_scale and grad_bias: expected both or none");
  if (!grad_scale) return;
  check_rows("saved_input", saved_input, {count, d}, grad.scalar_type(), false);
  if (weight_ids) {
    check_dense("grad_scale", grad_scale, {sets, d}, sums),
        check_dense("grad_bias", grad_bias, {sets, d}, sums);
  } else {
    check_dense("grad_scale", grad_scale, {d}, sums),
        check_dense("grad_bias", grad_bias, {d}, sums);
  }
}

// X [L, d, r] of a map, in the dtype that all its tensors share, with its signs and base.
inline ScalarType check_map(const Tensor& X, const Optional& signs, const Optional& base) {
  STD_TORCH_CHECK(X.dim() == 3, "reft_kernels_cpu: X: expected [L, d, r]");
  const int64_t layers = X.sizes()[0], d = X.sizes()[1], r = X.sizes()[2];
  STD_TORCH_CHECK(r >= 1 && r <= kMaxRank && r <= d, "reft_kernels_cpu: X: got rank ", r,
                  ", expected 1 to min(d, ", kMaxRank, ")");
  const ScalarType dtype = sum_dtype(X.scalar_type());
  check_dense("X", X, {layers, d, r}, dtype);
  check_dense("signs", signs, {layers, r}, dtype);
  check_dense("base", base, {layers, d, r}, dtype);
  return dtype;
}

inline void check_build(const Tensor& X, const Optional& signs, const Optional& base,
                        const Optional& base_point, const Optional& W, const Tensor& R,
                        const Optional& D, const Tensor& aux) {
  const ScalarType dtype = check_map(X, signs, base);
  const int64_t layers = X.sizes()[0], d = X.sizes()[1], r = X.sizes()[2];
  STD_TORCH_CHECK(bool(base) == bool(base_point),
                  "reft_kernels_cpu: base and base_point: expected both or none");
  STD_TORCH_CHECK(bool(W) == bool(D), "reft_kernels_cpu: W and D: expected both or none");
  check_dense("base_point", base_point, {layers, r, d}, dtype);
  check_dense("W", W, {layers, r, d}, dtype);
  check_dense("R", R, {layers, r, d}, dtype);
  check_dense("D", D, {layers, r, d}, dtype);
  check_dense("aux", aux, {layers, base ? 2 : 1, r, r}, dtype);
}

inline void check_build_backward(const Optional& grad_R, const Optional& grad_D, const Tensor& X,
                                 const Optional& signs, const Optional& base, const Tensor& aux,
                                 const Tensor& grad_X) {
  const ScalarType dtype = check_map(X, signs, base);
  const int64_t layers = X.sizes()[0], d = X.sizes()[1], r = X.sizes()[2];
  check_dense("grad_R", grad_R, {layers, r, d}, dtype);
  check_dense("grad_D", grad_D, {layers, r, d}, dtype);
  check_dense("aux", aux, {layers, base ? 2 : 1, r, r}, dtype);
  check_dense("grad_X", grad_X, {layers, d, r}, dtype);
}

}  // namespace reft
