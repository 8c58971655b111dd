// Arguments of the CUDA kernels' host functions: plain C++, shared with registration.cpp. The
// contracts are those of reft_kernels/ops.py; shapes are checked in Python. Every function launches
// once on the stream and returns the launch's error.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace reft_cuda {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// reft_kernels/activations.py: ACTIVATIONS, in its order.
enum class Activation : int { kLinear, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid };

constexpr int kMaxRank = 256;

// A tensor of any served dtype, read in fp32; null where it is absent.
struct AnyDtype {
  const void* data;
  Dtype dtype;
};

// [N, d] rows selected from a [M, d] hidden state: channel stride 1, `stride` elements from row to
// row.
struct Selection {
  const int32_t* rows;        // [N] row numbers, -1 skips
  const int32_t* weight_ids;  // [N], or null: one set
  int64_t num_rows;           // N > 0
  int d;                      // > 0
  int rank;                   // 1 to kMaxRank
  int sets;                   // 1 without weight_ids
};

struct EditForward {
  Selection selection;
  Dtype dtype, weight_dtype;  // fp32 with fp32, or half precision with fp32 or its own dtype
  const void* source;
  void* out;  // may be source
  int64_t source_stride, out_stride;
  const void* read;                          // [sets, rank, d], or null
  const void* write;                         // [sets, rank, d]
  AnyDtype read_bias, subtract_bias, coeff;  // [sets, rank] twice, [N, rank]
  void* saved_input;                         // [N, d] contiguous, or null: not wanted
  float* u;                                  // [N, rank], or null
  float* z;                                  // [N, rank], or null
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
  const float* z;     // [N, rank], or null: linear
  float* small;       // [N, count, padded_rank]: dz, coeff * u and, where count = 3, coeff * delta;
                      // zero-padded
  float* grad_coeff;  // [N, rank], or null
  Activation activation;
};

struct EditGradient {
  Selection selection;
  Dtype dtype;
  const void* grad;
  void* out;  // dh, may be grad; null: not wanted
  const void* saved_input;
  int64_t grad_stride, out_stride, kept_stride;
  AnyDtype read, write;  // [sets, rank, d]
  const float* small;    // as EditDelta leaves it
  float *grad_read, *grad_read_bias, *grad_write,
      *grad_subtract_bias;  // all null where no weight's gradient is wanted
  bool subtract_projection, linear;
};

// dz and coeff * u; where the activation is not linear and a projection is subtracted also coeff *
// delta.
__host__ __device__ constexpr int small_count(bool subtract_projection, bool linear) {
  return subtract_projection && !linear ? 3 : 2;
}
__host__ __device__ constexpr int padded_rank(int rank) { return (rank + 7) / 8 * 8; }

cudaError_t edit_forward(const EditForward& arguments, cudaStream_t stream);
cudaError_t edit_delta(const EditDelta& arguments, int count,
                       cudaStream_t stream);  // count: of `small`
cudaError_t edit_gradient(const EditGradient& arguments, cudaStream_t stream);

// Orthonormal maps of reft_kernels/orthonormal.py, all contiguous fp32; optional tensors are null.
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
  const float* aux;  // as the forward wrote it
  float* grad_X;     // [layers, d, rank]
};

// How a build is spread over the device; made by build_plan, which reads the device's properties.
struct BuildPlan {
  int splits;     // blocks a layer
  bool clusters;  // the splits are a thread-block cluster; otherwise, past one split, a cooperative
                  // grid
  int64_t scratch_bytes;  // global memory that the launch needs
};

cudaError_t build_forward_plan(int layers, int d, int rank, BuildPlan* plan);
cudaError_t build_backward_plan(int layers, int d, int rank, BuildPlan* plan);
cudaError_t build_forward(const BuildForward& arguments, const BuildPlan& plan, void* scratch,
                          cudaStream_t stream);
cudaError_t build_backward(const BuildBackward& arguments, const BuildPlan& plan, void* scratch,
                           cudaStream_t stream);

}  // namespace reft_cuda
