// Argument checks of the operators in registration.cpp, run before any allocation or write. Their
// messages match reft_kernels/operator_checks.py; std::invalid_argument becomes ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "edit.h"

namespace reft {

using Sizes = std::initializer_list<int64_t>;

// Largest supported rank; the kernels keep one row's coefficients in arrays of this size.
constexpr int64_t kMaxRank = 256;
constexpr const char* kActivations[] = {"linear", "relu", "gelu",   "gelu_tanh",
                                        "silu",   "tanh", "sigmoid"};
constexpr const char* kFloatingNames =
    "torch.float32, torch.bfloat16, torch.float16, torch.float64";

// Stable ABI code of a tensor's dtype.
inline int32_t code_of(const Tensor& tensor) {
  int32_t code = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// Stable ABI codes of the supported dtypes; int32 is the dtype of index tensors.
struct Codes {
  int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16(), float16 = aoti_torch_dtype_float16();
  int32_t int32 = aoti_torch_dtype_int32();
};
inline const Codes kCodes;

inline bool is_floating(int32_t code) {
  return code == kCodes.float32 || code == kCodes.bfloat16 || code == kCodes.float16 ||
         code == kCodes.float64;
}

// Dtype in which values of the given dtype are accumulated.
inline int32_t sum_code(int32_t code) {
  return code == kCodes.float64 ? kCodes.float64 : kCodes.float32;
}

// ---- error messages

inline std::string joined(const int64_t* numbers, int64_t count) {
  std::string out = "(";
  for (int64_t i = 0; i < count; ++i) out += (i ? ", " : "") + std::to_string(numbers[i]);
  return out + (count == 1 ? ",)" : ")");
}
inline std::string joined(Sizes sizes) { return joined(sizes.begin(), int64_t(sizes.size())); }

inline std::string dtype_name(int32_t code) {
  const std::pair<int32_t, const char*> known[] = {
      {kCodes.float32, "float32"},
      {kCodes.float64, "float64"},
      {kCodes.bfloat16, "bfloat16"},
      {kCodes.float16, "float16"},
      {kCodes.int32, "int32"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
  };
  for (const auto& [number, name] : known)
    if (number == code) return std::string("torch.") + name;
  return "another dtype";
}

inline std::string described(const Tensor& tensor) {
  return "shape " + joined(tensor.sizes().data(), tensor.dim()) + ", " +
         dtype_name(code_of(tensor)) + ", cpu";
}

// ---- checks of one argument

// Checks the arguments of one operator; every error message starts with the operator's name.
class ArgumentChecker {
 public:
  explicit ArgumentChecker(const char* op) : op_(op) {}

  [[noreturn]] void fail(const char* name, const std::string& text) const {
    throw std::invalid_argument(std::string(op_) + ": " + name + ": " + text);
  }
  [[noreturn]] void reject(const char* name, const Tensor& got, const std::string& expected) const {
    fail(name, "got " + described(got) + ", expected " + expected);
  }

  // Rejects None, which the dispatcher accepts even where the schema requires a tensor.
  void require_defined(const char* name, const Tensor& tensor) const {
    if (!tensor.defined()) fail(name, "got NoneType None, expected a tensor");
  }

  void sizes(const char* name, const Tensor& tensor, Sizes expected, const char* more = "") const {
    const int64_t dims = tensor.dim();
    if (dims == int64_t(expected.size()) &&
        std::equal(expected.begin(), expected.end(), tensor.sizes().data()))
      return;
    reject(name, tensor, "shape " + joined(expected) + more);
  }

  // Checks a floating-point tensor from the caller: a weight, a coefficient or a gradient.
  void floating(const char* name, const Tensor& tensor, Sizes expected) const {
    sizes(name, tensor, expected);
    if (!is_floating(code_of(tensor)))
      reject(name, tensor, std::string("one of ") + kFloatingNames);
  }
  void floating(const char* name, const Optional& tensor, Sizes expected) const {
    if (tensor) floating(name, *tensor, expected);
  }

  // Checks a tensor returned by the forward, which must have exactly this shape and dtype.
  void exact(const char* name, const Tensor& tensor, Sizes expected, int32_t code) const {
    require_defined(name, tensor);
    if (code_of(tensor) != code)
      reject(name, tensor, dtype_name(code) + ", as the forward returned it");
    sizes(name, tensor, expected, ", as the forward returned it");
  }

  // Checks hidden states [M, d] or their gradient. If the tensor is written in place, its elements
  // must not overlap in memory.
  void hidden(const char* name, const Tensor& tensor, bool written) const {
    require_defined(name, tensor);
    if (!is_floating(code_of(tensor)))
      reject(name, tensor, std::string("one of ") + kFloatingNames);
    if (tensor.dim() != 2 || tensor.sizes()[1] < 1) reject(name, tensor, "[M, d] with d >= 1");
    if (!written) return;
    const int64_t sizes[] = {tensor.sizes()[0], tensor.sizes()[1]},
                  strides[] = {tensor.stride(0), tensor.stride(1)};
    const bool distinct =
        (sizes[0] <= 1 || strides[0] > 0) && (sizes[1] <= 1 || strides[1] > 0) &&
        (sizes[0] <= 1 || sizes[1] <= 1 || strides[0] > (sizes[1] - 1) * strides[1] ||
         strides[1] > (sizes[0] - 1) * strides[0]);
    if (!distinct && sizes[0] > 0)
      reject(name, tensor, "no elements at one address (strides " + joined(strides, 2) + ")");
  }

  // Rejects an input that overlaps the tensor being written, if both are contiguous.
  void no_overlap(const Tensor& written, const char* name, const Tensor& other) const {
    const int64_t bytes = other.numel() * int64_t(other.element_size());
    const char *first = static_cast<const char*>(written.data_ptr()),
               *second = static_cast<const char*>(other.data_ptr());
    const int64_t written_bytes = written.numel() * int64_t(written.element_size());
    if (bytes == 0 || second >= first + written_bytes || second + bytes <= first) return;
    if (written.is_contiguous() && other.is_contiguous())
      reject(name, other, "memory apart from what is written");
  }
  void no_overlap(const Tensor& written, const char* name, const Optional& other) const {
    if (other) no_overlap(written, name, *other);
  }

  Activation activation(const std::string& name) const {
    for (int i = 0; i < int(std::size(kActivations)); ++i)
      if (name == kActivations[i]) return Activation(i);
    std::string expected;
    for (const char* known : kActivations)
      expected += (expected.empty() ? "" : ", ") + std::string(known);
    fail("activation", "got '" + std::string(name.c_str()) + "', expected one of " + expected);
  }

  // Sizes of write: [r, d], or [S, r, d] with weight_ids.
  struct Weights {
    int64_t sets, r, d;
    bool with_sets;
    template <class Check>
    void matrix(const Check& check) const {
      with_sets ? check(Sizes{sets, r, d}) : check(Sizes{r, d});
    }
    template <class Check>
    void vector(const Check& check) const {
      with_sets ? check(Sizes{sets, r}) : check(Sizes{r});
    }
  };
  Weights write(const Tensor& write, const Optional& weight_ids, int64_t d) const {
    require_defined("write", write);
    const bool with_sets = weight_ids.has_value();
    const int64_t dims = with_sets ? 3 : 2;
    if (write.dim() != dims || write.sizes()[dims - 1] != d || (with_sets && write.sizes()[0] < 1))
      reject("write", write,
             (with_sets ? "[S, r, " : "[r, ") + std::to_string(d) +
                 (with_sets ? "] (with" : "] (no") + " weight_ids)");
    const int64_t r = write.sizes()[dims - 2];
    if (r < 1 || r > kMaxRank) reject("write", write, "rank 1 <= r <= " + std::to_string(kMaxRank));
    if (!is_floating(code_of(write)))
      reject("write", write, std::string("one of ") + kFloatingNames);
    return {with_sets ? write.sizes()[0] : 1, r, d, with_sets};
  }

  // Checks scale: [d], or [S, d] with weight_ids. Returns S.
  int64_t scale(const Tensor& scale, const Optional& weight_ids, int64_t d) const {
    require_defined("scale", scale);
    if (!weight_ids) return floating("scale", scale, {d}), 1;
    if (scale.dim() != 2 || scale.sizes()[0] < 1)
      reject("scale", scale, "[S, " + std::to_string(d) + "] (with weight_ids)");
    return floating("scale", scale, {scale.sizes()[0], d}), scale.sizes()[0];
  }

  // Checks rows and weight_ids, including their values, and makes both contiguous. Returns N.
  int64_t selection(int64_t all_rows, Optional& rows, Optional& weight_ids, int64_t sets) const {
    int64_t count = all_rows;
    if (rows) {
      index("rows", *rows, -1);
      count = rows->sizes()[0];
      row_values(static_cast<const int32_t*>(rows->data_ptr()), count, all_rows);
    }
    if (weight_ids) {
      index("weight_ids", *weight_ids, count);
      set_values(static_cast<const int32_t*>(weight_ids->data_ptr()), count, sets);
    }
    return count;
  }

 private:
  void index(const char* name, Tensor& index, int64_t length) const {
    if (code_of(index) != kCodes.int32) reject(name, index, "torch.int32");
    if (index.dim() != 1 || (length >= 0 && index.sizes()[0] != length))
      reject(name, index, "shape [" + (length < 0 ? "N" : std::to_string(length)) + "]");
    if (!index.is_contiguous()) index = torch::stable::contiguous(index);
  }

  static std::string range(int32_t low, int32_t high) {
    return "got values from " + std::to_string(low) + " to " + std::to_string(high);
  }

  // Checks that row numbers are -1 or distinct values in [0, limit). Ascending rows are distinct,
  // so the search for duplicates is skipped for them.
  void row_values(const int32_t* rows, int64_t count, int64_t limit) const {
    if (count == 0) return;
    int32_t low = rows[0], high = rows[0], last = -1;
    bool ascending = true;
    for (int64_t n = 0; n < count; ++n) {
      low = std::min(low, rows[n]), high = std::max(high, rows[n]);
      if (rows[n] >= 0) ascending &= rows[n] > last, last = rows[n];
    }
    if (low < -1 || high >= limit)
      fail("rows", range(low, high) + ", expected row numbers in [0, " + std::to_string(limit) +
                       "), or -1 to skip an entry");
    if (ascending) return;
    std::vector<bool> seen(size_t(high) + 1);
    int32_t repeated = std::numeric_limits<int32_t>::max();
    for (int64_t n = 0; n < count; ++n) {
      if (rows[n] < 0) continue;
      if (seen[size_t(rows[n])]) repeated = std::min(repeated, rows[n]);
      seen[size_t(rows[n])] = true;
    }
    if (repeated != std::numeric_limits<int32_t>::max())
      fail("rows", "row " + std::to_string(repeated) +
                       " occurs more than once, expected each row at most once");
  }

  void set_values(const int32_t* weight_ids, int64_t count, int64_t sets) const {
    if (count == 0) return;
    const auto [low, high] = std::minmax_element(weight_ids, weight_ids + count);
    if (*low < 0 || *high >= sets)
      fail("weight_ids",
           range(*low, *high) + ", expected set numbers in [0, " + std::to_string(sets) + ")");
  }

  const char* op_;
};

// ---- checks of all arguments of a call

// Sizes of an edit call: number of entries N, rank r and channels d.
struct EditSizes {
  int64_t count, r, d;
  Activation activation;
};

inline EditSizes check(const ArgumentChecker& checker, EditCall& call, bool in_place) {
  checker.hidden("hidden", call.hidden, in_place);
  const int64_t all_rows = call.hidden.sizes()[0], d = call.hidden.sizes()[1];
  const Activation activation = checker.activation(call.activation);
  const ArgumentChecker::Weights weights = checker.write(call.write, call.weight_ids, d);
  weights.matrix([&](Sizes sizes) { checker.floating("read", call.read, sizes); });
  weights.vector([&](Sizes sizes) { checker.floating("read_bias", call.read_bias, sizes); });
  if (call.subtract_bias && !call.subtract_projection)
    checker.reject("subtract_bias", *call.subtract_bias, "None without subtract_projection");
  weights.vector(
      [&](Sizes sizes) { checker.floating("subtract_bias", call.subtract_bias, sizes); });
  const int64_t count = checker.selection(all_rows, call.rows, call.weight_ids, weights.sets);
  checker.floating("coeff", call.coeff, {count, weights.r});
  if (in_place) {
    checker.no_overlap(call.hidden, "rows", call.rows),
        checker.no_overlap(call.hidden, "weight_ids", call.weight_ids);
    checker.no_overlap(call.hidden, "read", call.read),
        checker.no_overlap(call.hidden, "read_bias", call.read_bias);
    checker.no_overlap(call.hidden, "write", call.write),
        checker.no_overlap(call.hidden, "subtract_bias", call.subtract_bias);
    checker.no_overlap(call.hidden, "coeff", call.coeff);
  }
  return {count, weights.r, d, activation};
}

inline EditSizes check(const ArgumentChecker& checker, EditBackwardCall& call, bool in_place) {
  checker.hidden("grad", call.grad, in_place);
  const int64_t all_rows = call.grad.sizes()[0], d = call.grad.sizes()[1];
  const Activation activation = checker.activation(call.activation);
  const ArgumentChecker::Weights weights = checker.write(call.write, call.weight_ids, d);
  weights.matrix([&](Sizes sizes) { checker.floating("read", call.read, sizes); });
  const int64_t count = checker.selection(all_rows, call.rows, call.weight_ids, weights.sets),
                r = weights.r;
  const int32_t dtype = code_of(call.grad), sums = sum_code(dtype);
  checker.floating("coeff", call.coeff, {count, r});
  checker.exact("saved_input", call.saved_input, {count, d}, dtype);
  checker.exact("u", call.u, {count, r}, sums);
  if (activation == Activation::linear)
    checker.exact("z", call.z, {0}, sums);
  else
    checker.exact("z", call.z, {count, r}, sums);
  if (in_place) {
    checker.no_overlap(call.grad, "saved_input", call.saved_input),
        checker.no_overlap(call.grad, "u", call.u), checker.no_overlap(call.grad, "z", call.z);
    checker.no_overlap(call.grad, "rows", call.rows),
        checker.no_overlap(call.grad, "weight_ids", call.weight_ids);
    checker.no_overlap(call.grad, "read", call.read),
        checker.no_overlap(call.grad, "write", call.write);
    checker.no_overlap(call.grad, "coeff", call.coeff);
  }
  return {count, r, d, activation};
}

inline void same_as_scale(const ArgumentChecker& checker, const char* name, const Tensor& tensor,
                          const Tensor& scale) {
  checker.require_defined(name, tensor);
  if (scale.dim() == 1)
    checker.floating(name, tensor, {scale.sizes()[0]});
  else
    checker.floating(name, tensor, {scale.sizes()[0], scale.sizes()[1]});
}

// Returns N.
inline int64_t check(const ArgumentChecker& checker, RedCall& call, bool in_place) {
  checker.hidden("hidden", call.hidden, in_place);
  const int64_t all_rows = call.hidden.sizes()[0], d = call.hidden.sizes()[1];
  const int64_t sets = checker.scale(call.scale, call.weight_ids, d);
  same_as_scale(checker, "bias", call.bias, call.scale);
  const int64_t count = checker.selection(all_rows, call.rows, call.weight_ids, sets);
  if (in_place) {
    checker.no_overlap(call.hidden, "rows", call.rows),
        checker.no_overlap(call.hidden, "weight_ids", call.weight_ids);
    checker.no_overlap(call.hidden, "scale", call.scale),
        checker.no_overlap(call.hidden, "bias", call.bias);
  }
  return count;
}

// Returns N.
inline int64_t check(const ArgumentChecker& checker, RedBackwardCall& call, bool in_place) {
  checker.hidden("grad", call.grad, in_place);
  const int64_t all_rows = call.grad.sizes()[0], d = call.grad.sizes()[1];
  const int64_t sets = checker.scale(call.scale, call.weight_ids, d);
  const int64_t count = checker.selection(all_rows, call.rows, call.weight_ids, sets);
  checker.exact("saved_input", call.saved_input, {count, d}, code_of(call.grad));
  if (in_place) {
    checker.no_overlap(call.grad, "saved_input", call.saved_input),
        checker.no_overlap(call.grad, "rows", call.rows);
    checker.no_overlap(call.grad, "weight_ids", call.weight_ids),
        checker.no_overlap(call.grad, "scale", call.scale);
  }
  return count;
}

// Sizes of a map's X [layers, d, r].
struct MapSizes {
  int64_t layers, d, r;
};

inline MapSizes check_map(const ArgumentChecker& checker, const Tensor& X, const Optional& signs,
                          const Optional& base) {
  checker.require_defined("X", X);
  if (!is_floating(code_of(X))) checker.reject("X", X, std::string("one of ") + kFloatingNames);
  if (X.dim() != 3 || X.sizes()[2] < 1 || X.sizes()[2] > kMaxRank || X.sizes()[2] > X.sizes()[1])
    checker.reject("X", X, "[L, d, r] with 1 <= r <= min(d, " + std::to_string(kMaxRank) + ")");
  const MapSizes sizes{X.sizes()[0], X.sizes()[1], X.sizes()[2]};
  checker.floating("signs", signs, {sizes.layers, sizes.r});
  checker.floating("base", base, {sizes.layers, sizes.d, sizes.r});
  return sizes;
}

inline MapSizes check(const ArgumentChecker& checker, const BuildCall& call) {
  const MapSizes sizes = check_map(checker, call.X, call.signs, call.base);
  if (call.base_point && !call.base)
    checker.reject("base_point", *call.base_point, "[L, r, d] with base, else None");
  if (call.base && !call.base_point)
    checker.fail("base_point", "got NoneType None, expected [L, r, d] with base, else None");
  checker.floating("base_point", call.base_point, {sizes.layers, sizes.r, sizes.d});
  checker.floating("W", call.W, {sizes.layers, sizes.r, sizes.d});
  return sizes;
}

inline MapSizes check(const ArgumentChecker& checker, const BuildBackwardCall& call) {
  const MapSizes sizes = check_map(checker, call.X, call.signs, call.base);
  checker.floating("grad_R", call.grad_R, {sizes.layers, sizes.r, sizes.d});
  checker.floating("grad_D", call.grad_D, {sizes.layers, sizes.r, sizes.d});
  checker.exact("aux", call.aux, {sizes.layers, call.base ? 2 : 1, sizes.r, sizes.r},
                sum_code(code_of(call.X)));
  return sizes;
}

}  // namespace reft
