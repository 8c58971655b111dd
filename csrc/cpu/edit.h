// The edits on the CPU: arguments of the kernels, as reft_kernels/reference.py defines the
// mathematics.
#pragma once

#include <stdint.h>

namespace reft {

enum class Dtype : int { float32, float64, bfloat16, float16 };
constexpr int kDtypes = 4;

// The numbers of reft_kernels/activations.py's names, in its order.
enum class Activation : int { linear, relu, gelu, gelu_tanh, silu, tanh, sigmoid };

// A contiguous tensor of any of the dtypes; null data: absent.
struct Typed {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  explicit operator bool() const { return data != nullptr; }
};

// Rows of a matrix: row i begins at data + i * stride, its elements are consecutive.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
  explicit operator bool() const { return data != nullptr; }
};

// Which rows, and which weights each uses.
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
  Rows source, out;   // may be the same
  Rows saved_input;   // [N, d], null: not wanted
  void* u = nullptr;  // [N, r], null: not wanted
  void* z = nullptr;  // [N, r], null: not wanted
};

struct EditBackward {
  Selection selection;
  EditWeights weights;
  Rows grad, out;           // may be the same; out null: not wanted
  Rows saved_input;         // rows given: their input [N, d]; all rows: the output y [N, d]
  const void* u = nullptr;  // [N, r]
  const void* z = nullptr;  // [N, r], with an activation
  void* grad_read =
      nullptr;  // [S, r, d], null: not wanted; the others of weights then too, but for grad_write
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
  Rows source, out, saved_input;  // saved_input null: not wanted
};

struct RedBackward {
  Selection selection;
  int64_t d = 0;
  Typed scale;
  Rows grad, out, saved_input;  // out null: not wanted
  void* grad_scale = nullptr;   // [S, d], null: not wanted
  void* grad_bias = nullptr;
};

}  // namespace reft
