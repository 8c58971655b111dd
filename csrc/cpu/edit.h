// Arguments of the CPU edit kernels. The mathematics is defined in reft_kernels/reference.py.
#pragma once

#include <stdint.h>

namespace reft {

enum class Dtype : int { float32, float64, bfloat16, float16 };
constexpr int kDtypes = 4;

// Same order as the names in reft_kernels/activations.py.
enum class Activation : int { linear, relu, gelu, gelu_tanh, silu, tanh, sigmoid };

// A contiguous tensor of any supported dtype; null data: absent.
struct Typed {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  explicit operator bool() const { return data != nullptr; }
};

// Rows of a matrix: row i starts at data + i * stride (in elements); its elements are contiguous.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
  explicit operator bool() const { return data != nullptr; }
};

// The rows to edit and the set of weights used for each.
struct Selection {
  int64_t entries = 0;                  // N: the length of rows, or the number of all rows
  const int32_t* rows = nullptr;        // [N], -1 skips; null: entry n is row n
  const int32_t* weight_ids = nullptr;  // [N]; null: one set of weights
  int64_t sets = 1;                     // S
};

struct EditWeights {
  int64_t d = 0, r = 0;
  Typed read, read_bias;       // A [S, r, d], c [S, r]; may be absent
  Typed write, subtract_bias;  // B [S, r, d], p [S, r]; p may be absent
  Typed coeff;                 // [N, r], may be absent
  bool subtract_projection = false;
  Activation activation = Activation::linear;
};

// u, z and the gradients of weights are contiguous, in fp32 (fp64 for fp64 hidden states).
struct EditForward {
  Selection selection;
  EditWeights weights;
  Rows source, out;   // may alias
  Rows saved_input;   // [N, d]; null: not needed
  void* u = nullptr;  // [N, r]; null: not needed
  void* z = nullptr;  // [N, r]; null: not needed
};

struct EditBackward {
  Selection selection;
  EditWeights weights;
  Rows grad, out;  // may alias; out null: not needed
  // [N, d]: the inputs if rows are given, else the outputs y of all rows.
  Rows saved_input;
  const void* u = nullptr;  // [N, r]
  const void* z = nullptr;  // [N, r]; not used if the activation is linear
  // If grad_write is null, no gradients of weights are computed. grad_read is null without read.
  void* grad_read = nullptr;           // [S, r, d]
  void* grad_read_bias = nullptr;      // [S, r]
  void* grad_write = nullptr;          // [S, r, d]
  void* grad_subtract_bias = nullptr;  // [S, r]
  void* grad_coeff = nullptr;          // [N, r]
};

// y = scale * x + bias over the channels.
struct RedForward {
  Selection selection;
  int64_t d = 0;
  Typed scale, bias;              // [S, d]
  Rows source, out, saved_input;  // saved_input null: not needed
};

struct RedBackward {
  Selection selection;
  int64_t d = 0;
  Typed scale;
  Rows grad, out, saved_input;  // out null: not needed
  void* grad_scale = nullptr;   // [S, d]; null: grad_bias is not needed either
  void* grad_bias = nullptr;
};

}  // namespace reft
