// Host functions of the CUDA kernels and their arguments, in plain C++ for registration.cpp. They
// implement the operators of reft_kernels/ops.py; shapes are checked in Python. Each function
// launches one kernel on the stream and returns the error of the launch.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace reft_cuda {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// In the order of ACTIVATIONS in reft_kernels/activations.py.
enum class Activation : int { kLinear, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid };

constexpr int kMaxRank = 256;

// A tensor of any supported dtype, converted to fp32 when read; data is null if it is absent.
struct AnyDtype {
  const void* data;
  Dtype dtype;
};

// N rows of hidden states [M, d] with unit stride in the last dimension.
struct Selection {
  const int32_t* rows;        // [N] row numbers, -1 skips an entry; null for all rows, which
                              // edit_tiles alone supports
  const int32_t* weight_ids;  // [N], or null for a single weight set
  int64_t num_rows;           // N > 0
  int d;                      // > 0
  int rank;                   // 1 to kMaxRank
  int sets;                   // 1 without weight_ids
};

struct EditForward {
  Selection selection;
  Dtype dtype, weight_dtype;  // weights are fp32 or have the dtype of the hidden states
  const void* source;
  void* out;  // may be source
  int64_t source_stride, out_stride;
  const void* read;                          // [sets, rank, d], or null
  const void* write;                         // [sets, rank, d]
  AnyDtype read_bias, subtract_bias, coeff;  // [sets, rank] twice, [N, rank]
  void* saved_input;                         // [N, d] contiguous, or null if not needed
  float* u;                                  // [N, rank], or null if not needed
  float* z;                                  // [N, rank], or null if not needed
  bool subtract_projection;
  Activation activation;
};

struct EditDelta {
  Selection selection;
  Dtype dtype, weight_dtype;  // as in EditForward
  const void* grad;
  int64_t grad_stride;
  const void* write;
  AnyDtype coeff;
  const float* u;     // [N, rank]
  const float* z;     // [N, rank], or null if the activation is linear
  float* small;       // [N, count, padded_rank]: dz, coeff * u and, if count = 3, coeff * delta,
                      // padded with zeros
  float* grad_coeff;  // [N, rank], or null
  Activation activation;
};

struct EditGradient {
  Selection selection;
  Dtype dtype;
  const void* grad;
  void* out;  // dh, may be grad; null if not needed
  const void* saved_input;
  int64_t grad_stride, out_stride, kept_stride;
  AnyDtype read, write;  // [sets, rank, d]
  const float* small;    // result of edit_delta
  float *grad_read, *grad_read_bias, *grad_write,
      *grad_subtract_bias;  // all null if no gradient of a weight is needed
  bool subtract_projection, linear;
};

// Number of vectors per row in `small`: dz and coeff * u, and also coeff * delta if the activation
// is nonlinear and the projection is subtracted.
__host__ __device__ constexpr int small_count(bool subtract_projection, bool linear) {
  return subtract_projection && !linear ? 3 : 2;
}
__host__ __device__ constexpr int padded_rank(int rank) { return (rank + 7) / 8 * 8; }

// Launches edit_tiles where edit_tiles_serves.
cudaError_t edit_forward(const EditForward& arguments, cudaStream_t stream);
bool edit_tiles_serves(const EditForward& arguments);
cudaError_t edit_tiles(const EditForward& arguments, cudaStream_t stream);
// Launches edit_delta_tiles where edit_delta_tiles_serves. count: result of small_count
cudaError_t edit_delta(const EditDelta& arguments, int count, cudaStream_t stream);
bool edit_delta_tiles_serves(const EditDelta& arguments);
cudaError_t edit_delta_tiles(const EditDelta& arguments, int count, cudaStream_t stream);
cudaError_t edit_gradient(const EditGradient& arguments, cudaStream_t stream);

// Orthonormal maps of reft_kernels/orthonormal.py. All tensors are contiguous fp32; an optional
// tensor may be null.
struct BuildForward {
  int layers, d, rank;  // layers > 0, 1 <= rank <= min(d, kMaxRank)
  bool cayley;
  const float* X;      // [layers, d, rank]
  const float* signs;  // [layers, rank]
  const float* base;   // [layers, d, rank]: V0 strictly below the diagonal, T0 on and above it
  const float* point;  // [layers, rank, d], with base
  const float* W;      // [layers, rank, d]
  float* R;            // [layers, rank, d]
  float* D;            // [layers, rank, d], with W
  float* aux;          // [layers, 1 or 2, rank, rank]
};

struct BuildBackward {
  int layers, d, rank;
  bool cayley;
  const float *grad_R, *grad_D;  // [layers, rank, d], not both null
  const float* X;
  const float* signs;
  const float* base;
  const float* aux;  // result of the forward pass
  float* grad_X;     // [layers, d, rank]
};

// Launch configuration of the orthonormal maps; depends on the properties of the device.
struct BuildPlan {
  int splits;     // blocks per layer
  bool clusters;  // whether the splits form a thread-block cluster; otherwise several splits use a
                  // cooperative launch
  int64_t scratch_bytes;  // global memory that the launch needs
};

cudaError_t build_forward_plan(int layers, int d, int rank, BuildPlan* plan);
cudaError_t build_backward_plan(int layers, int d, int rank, BuildPlan* plan);
cudaError_t build_forward(const BuildForward& arguments, const BuildPlan& plan, void* scratch,
                          cudaStream_t stream);
cudaError_t build_backward(const BuildBackward& arguments, const BuildPlan& plan, void* scratch,
                           cudaStream_t stream);

}  // namespace reft_cuda
