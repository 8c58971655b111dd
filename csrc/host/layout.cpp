#include "layout.h"

namespace reft::host {
namespace {

// Parts of one block of memory are aligned for wide loads of a GPU; a CPU's vectors need less.
int64_t rounded(int64_t bytes, const Tensor& like) {
  const int64_t alignment = like.is_cpu() ? 32 : 256;
  return (bytes + alignment - 1) / alignment * alignment;
}

struct SavedBytes {
  int64_t input, sum;
};

SavedBytes saved_parts(const Edit& e, const Sizes& s) {
  const at::ScalarType dtype = e.hidden.scalar_type();
  return {e.rows.defined() ? rounded(bytes_of({s.entries, s.d}, dtype), e.hidden) : 0,
          rounded(bytes_of({s.entries, s.rank}, accumulation_dtype(dtype)), e.hidden)};
}

struct GradientBytes {
  int64_t matrix, vector;
};

GradientBytes gradient_parts(const Backward& b, const Sizes& s) {
  const at::ScalarType sums = accumulation_dtype(b.grad.scalar_type());
  return {rounded(bytes_of({s.rank, s.d}, sums), b.grad),
          rounded(bytes_of({s.rank}, sums), b.grad)};
}

bool is_row_major(const Tensor& tensor, int64_t d) {
  return tensor.dim() != 2 || (tensor.stride(0) == d && tensor.stride(1) == 1);
}

}  // namespace

Sizes sizes_of(const Tensor& hidden, const Tensor& rows, const Tensor& write) {
  const int64_t d = hidden.size(-1), num_rows = hidden.numel() / d;
  return {num_rows, d, rows.defined() ? rows.size(0) : num_rows, write.size(0)};
}

bool has_valid_layout(const Edit& e) {
  const Tensor& hidden = e.hidden;
  if (e.weight_ids.defined() || hidden.numel() == 0 || e.write.dim() != 2) return false;
  const Sizes s = sizes_of(hidden, Tensor(), e.write);
  if (e.write.size(1) != s.d || s.rank < 1 || s.rank > kMaxRank) return false;
  if (!is_row_major(hidden, s.d)) return false;
  if (e.subtract_bias.defined() && !e.settings.subtract_projection) return false;
  const auto* begin = static_cast<const char*>(hidden.const_data_ptr());
  const char* end = begin + hidden.nbytes();
  const auto lies_apart = [&](const Tensor& tensor) {
    const auto* first = static_cast<const char*>(tensor.const_data_ptr());
    return tensor.device() == hidden.device() && tensor.is_contiguous() &&
           (first >= end || first + tensor.nbytes() <= begin);
  };
  if (e.rows.defined() && (e.rows.scalar_type() != at::kInt || e.rows.dim() != 1 ||
                           e.rows.numel() == 0 || !lies_apart(e.rows)))
    return false;
  const int64_t n = e.rows.defined() ? e.rows.size(0) : s.num_rows;
  const auto fits = [&](const Tensor& tensor, at::IntArrayRef sizes) {
    return !tensor.defined() ||
           (tensor.sizes() == sizes && is_floating(tensor.scalar_type()) && lies_apart(tensor));
  };
  return fits(e.read, {s.rank, s.d}) && fits(e.read_bias, {s.rank}) &&
         fits(e.write, {s.rank, s.d}) && fits(e.subtract_bias, {s.rank}) &&
         fits(e.coeff, {n, s.rank});
}

bool has_valid_layout(const Backward& b) {
  if (b.weight_ids.defined() || b.write.dim() != 2 || !b.grad.is_contiguous()) return false;
  if (b.grad.numel() == 0) return false;
  const Sizes s = sizes_of(b.grad, Tensor(), b.write);
  if (!is_row_major(b.grad, s.d)) return false;
  if (b.rows.defined() && (b.rows.dim() != 1 || b.rows.scalar_type() != at::kInt ||
                           b.rows.numel() == 0 || !b.rows.is_contiguous()))
    return false;
  const int64_t n = b.rows.defined() ? b.rows.size(0) : s.num_rows;
  const at::ScalarType dtype = b.grad.scalar_type(), sums = accumulation_dtype(dtype);
  // saved tensors may come from the hooks of a user
  const auto fits = [&](const Tensor& tensor, at::IntArrayRef sizes) {
    return !tensor.defined() ||
           (tensor.sizes() == sizes && tensor.is_contiguous() && tensor.device() == b.grad.device());
  };
  return b.saved_input.scalar_type() == dtype && b.u.scalar_type() == sums &&
         (!b.z.defined() || b.z.scalar_type() == sums) && fits(b.saved_input, {n, s.d}) &&
         fits(b.u, {n, s.rank}) && fits(b.z, {n, s.rank}) && fits(b.read, {s.rank, s.d}) &&
         fits(b.write, {s.rank, s.d}) && fits(b.coeff, {n, s.rank});
}

int64_t saved_bytes(const Edit& e, const Sizes& s) {
  const SavedBytes parts = saved_parts(e, s);
  return parts.input + parts.sum * (e.settings.activation ? 2 : 1);
}

int64_t gradient_bytes(const Backward& b, const Sizes& s) {
  const GradientBytes parts = gradient_parts(b, s);
  return 2 * (parts.matrix + parts.vector);
}

Edited new_results(const Edit& e, const Sizes& s) {
  Edited result;
  if (e.in_place) {
    result.out = e.hidden;
  } else {
    result.out = empty(e.hidden.sizes(), e.hidden.scalar_type(), e.hidden);
    if (e.rows.defined()) result.out.copy_(e.hidden);
  }
  if (!e.save) return result;
  const SavedBytes parts = saved_parts(e, s);
  const at::ScalarType sums = accumulation_dtype(e.hidden.scalar_type());
  const c10::Storage memory = new_memory(saved_bytes(e, s), e.hidden);
  const auto part = [&](int64_t offset, at::IntArrayRef sizes, at::ScalarType dtype) {
    return part_of(memory, offset, sizes, dtype, e.hidden);
  };
  if (e.rows.defined())
    result.saved_input = part(0, {s.entries, s.d}, e.hidden.scalar_type());
  result.u = part(parts.input, {s.entries, s.rank}, sums);
  if (e.settings.activation)
    result.z = part(parts.input + parts.sum, {s.entries, s.rank}, sums);
  return result;
}

Gradients new_gradients(const Backward& b, const Sizes& s) {
  Gradients grads;
  if (b.in_place) {
    grads.hidden = b.grad;
  } else if (b.need_hidden) {
    grads.hidden = empty(b.grad.sizes(), b.grad.scalar_type(), b.grad);
    if (b.rows.defined()) grads.hidden.copy_(b.grad);
  }
  const at::ScalarType sums = accumulation_dtype(b.grad.scalar_type());
  if (b.need_weights) {
    const GradientBytes parts = gradient_parts(b, s);
    const c10::Storage memory = new_memory(gradient_bytes(b, s), b.grad);
    const auto part = [&](int64_t offset, at::IntArrayRef sizes) {
      return part_of(memory, offset, sizes, sums, b.grad);
    };
    const int64_t biases = 2 * parts.matrix;
    if (b.read.defined()) grads.read = part(0, {s.rank, s.d});
    grads.write = part(parts.matrix, {s.rank, s.d});
    grads.read_bias = part(biases, {s.rank});
    if (b.settings.subtract_projection)
      grads.subtract_bias = part(biases + parts.vector, {s.rank});
  }
  // apart from the others, which the optimizer keeps longer
  if (b.coeff.defined()) grads.coeff = empty({s.entries, s.rank}, sums, b.grad);
  return grads;
}

}  // namespace reft::host
