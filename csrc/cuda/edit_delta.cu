// First launch of the edit's backward pass: with delta = B g, it computes
// dz = act'(z) * coeff * delta, coeff * u and the gradient of coeff, u * delta.
//
// It reads the rows of g once and writes the [N, r] tensors that the second launch needs, with rows
// padded with zeros.
#include "project.cuh"

namespace reft_cuda {
namespace {

template <class T, class W, int V, int ROWS>
__global__ void __launch_bounds__(kProjectThreads, 1)
    edit_delta_kernel(const EditDelta p, int count) {
  const Selection& selection = p.selection;
  const int r = selection.rank, padded = padded_rank(r);
  const int d = selection.d;
  auto& block = *dynamic_shared<RowBlock<ROWS>>();
  float* part = reinterpret_cast<float*>(dynamic_shared<unsigned char>() + 64);
  const int64_t first_entry = int64_t(blockIdx.x) * ROWS;
  load_rows(block, selection, first_entry);
  unsigned left = valid_rows(block);

#pragma unroll
  for (int q = 0; q < ROWS; ++q) {
    const int64_t n = first_entry + q;
    if (left >> q & 1 || n >= selection.num_rows) continue;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * padded; i += kProjectThreads)
      p.small[n * count * padded + i] = 0.0f;
    if (p.grad_coeff != nullptr)
#pragma unroll 1
      for (int i = threadIdx.x; i < r; i += kProjectThreads) p.grad_coeff[n * r + i] = 0.0f;
  }

  while (left != 0) {
    const int lead = __ffs(left) - 1;
    const unsigned active = rows_of_set(block, left, lead);
    left &= ~active;
    const T* g[ROWS];
    row_pointers(block, active, lead, static_cast<const T*>(p.grad), p.grad_stride, g);
    const W* write = static_cast<const W*>(p.write) + int64_t(block.set[lead]) * r * d;
    project<T, W, V, ROWS, false>(g, write, nullptr, r, d, part);
    __syncthreads();

    for (int e = threadIdx.x; e < padded * ROWS; e += kProjectThreads) {
      const int i = e / ROWS, q = e % ROWS;
      if (!(active >> q & 1)) continue;
      const int64_t n = first_entry + q;
      float* small = p.small + n * count * padded + i;
      float dz = 0.0f, used = 0.0f, ddelta = 0.0f;
      if (i < r) {
        const float delta = projected<ROWS>(part, r, q, i), u = p.u[n * r + i];
        ddelta = delta;
        used = u;
        if (p.coeff.data != nullptr) {
          const float coeff = load_any(p.coeff, n * r + i);
          ddelta *= coeff;
          used *= coeff;
          p.grad_coeff[n * r + i] = u * delta;
        }
        dz = p.z != nullptr ? ddelta * activation_derivative(p.z[n * r + i], p.activation) : ddelta;
      }
      small[0] = dz;
      small[padded] = used;
      if (count == 3) small[2 * padded] = ddelta;
    }
    __syncthreads();  // the next weight set overwrites `part`
  }
}

template <class T, class W, int V, int ROWS>
cudaError_t launch(const EditDelta& p, int count, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(ceil_div(p.selection.num_rows, ROWS)));
  config.blockDim = dim3(kProjectThreads);
  config.dynamicSmemBytes = 64 + sizeof(float) * part_size(ROWS, p.selection.rank);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, edit_delta_kernel<T, W, V, ROWS>, p, count);
}

template <class T, class W>
cudaError_t choose(const EditDelta& p, int count, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vectors = p.selection.d % V == 0 && p.grad_stride % V == 0 && aligned(p.grad, 16) &&
                       aligned(p.write, 16);
  if (!vectors) return launch<T, W, 1, 1>(p, count, stream);
  return rows_of_block(p.selection.num_rows) == 1 ? launch<T, W, V, 1>(p, count, stream)
                                                  : launch<T, W, V, 4>(p, count, stream);
}

}  // namespace

cudaError_t edit_delta(const EditDelta& p, int count, cudaStream_t stream) {
  const bool wide = p.weight_dtype == Dtype::kFloat32;
  if (!wide && p.weight_dtype != p.dtype) return cudaErrorInvalidValue;
  if (edit_delta_tiles_serves(p)) return edit_delta_tiles(p, count, stream);
  switch (p.dtype) {
    case Dtype::kFloat32:
      return choose<float, float>(p, count, stream);
    case Dtype::kBFloat16:
      return wide ? choose<__nv_bfloat16, float>(p, count, stream)
                  : choose<__nv_bfloat16, __nv_bfloat16>(p, count, stream);
    default:
      return wide ? choose<__half, float>(p, count, stream)
                  : choose<__half, __half>(p, count, stream);
  }
}

}  // namespace reft_cuda
