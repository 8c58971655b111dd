// Forward pass of the edit of selected rows, in one launch:
// y = x + B^T (coeff * u), u = act(A x + c) - (B x + p).
//
// A block processes one or four rows. First its warps compute z and B x, each for some of the
// weight vectors; the rows are read through L1. Then its threads compute y, each for some of the
// columns. If the rows of a block use several weight sets, this is repeated for each set.
#include "project.cuh"

namespace reft_cuda {
namespace {

template <class T, class W, int V, int ROWS>
__global__ void __launch_bounds__(kProjectThreads, 1) edit_forward_kernel(const EditForward p) {
  const Selection& selection = p.selection;
  const int r = selection.rank;
  const int d = selection.d;
  const bool linear = p.activation == Activation::kLinear;
  const bool fold = p.subtract_projection && linear;     // A x - B x is one product with A - B
  const bool second = p.subtract_projection && !linear;  // B x needs a separate product
  const bool first = p.read != nullptr || fold;

  auto& block = *dynamic_shared<RowBlock<ROWS>>();
  float* used =
      reinterpret_cast<float*>(dynamic_shared<unsigned char>() + 64);  // [r, ROWS]: coeff * u
  float* part_z = used + r * ROWS;
  float* part_q = part_z + part_size(ROWS, r);
  const int64_t first_entry = int64_t(blockIdx.x) * ROWS;
  load_rows(block, selection, first_entry);
  unsigned left = valid_rows(block);

#pragma unroll
  for (int q = 0; q < ROWS; ++q) {
    const int64_t n = first_entry + q;
    if (left >> q & 1 || n >= selection.num_rows) continue;
    // Skipped entries are saved as zeros, so that they add nothing to the weights' gradients
#pragma unroll 1
    for (int i = threadIdx.x; i < r; i += kProjectThreads) {
      if (p.u != nullptr) p.u[n * r + i] = 0.0f;
      if (p.z != nullptr) p.z[n * r + i] = 0.0f;
    }
    if (p.saved_input == nullptr) continue;
    const float zeros[V] = {};
#pragma unroll 1
    for (int c = int(threadIdx.x) * V; c < d; c += kProjectThreads * V)
      store<T, V>(static_cast<T*>(p.saved_input) + n * d + c, zeros);
  }

  while (left != 0) {
    const int lead = __ffs(left) - 1;
    const unsigned active = rows_of_set(block, left, lead);
    left &= ~active;
    const int64_t set = block.set[lead];
    const W* read = p.read == nullptr ? nullptr : static_cast<const W*>(p.read) + set * r * d;
    const W* write = static_cast<const W*>(p.write) + set * r * d;
    const T* x[ROWS];
    row_pointers(block, active, lead, static_cast<const T*>(p.source), p.source_stride, x);

    if (fold && read != nullptr)
      project<T, W, V, ROWS, true>(x, read, write, r, d, part_z);
    else if (first)
      project<T, W, V, ROWS, false>(x, read != nullptr ? read : write, nullptr, r, d, part_z);
    if (second) project<T, W, V, ROWS, false>(x, write, nullptr, r, d, part_q);
    __syncthreads();

    for (int e = threadIdx.x; e < r * ROWS; e += kProjectThreads) {
      const int i = e / ROWS, q = e % ROWS;
      float value = 0.0f;
      if (active >> q & 1) {
        const int64_t n = first_entry + q;
        float z = first ? projected<ROWS>(part_z, r, q, i) : 0.0f;
        if (p.read == nullptr) z = -z;  // A - B with A = 0
        if (p.read_bias.data != nullptr) z += load_any(p.read_bias, set * r + i);
        value = activate(z, p.activation);
        if (second) value -= projected<ROWS>(part_q, r, q, i);
        if (p.subtract_bias.data != nullptr) value -= load_any(p.subtract_bias, set * r + i);
        if (p.u != nullptr) p.u[n * r + i] = value;
        if (p.z != nullptr) p.z[n * r + i] = z;
        if (p.coeff.data != nullptr) value *= load_any(p.coeff, n * r + i);
      }
      used[e] = value;
    }
    __syncthreads();

    for (int c = int(threadIdx.x) * V; c < d; c += kProjectThreads * V) {
      Pack<T, V> value[ROWS];  // loaded before the loop to hide latency, used after it
#pragma unroll
      for (int q = 0; q < ROWS; ++q) value[q] = load_pack<T, V>(x[q] + c);
      float acc[ROWS][V] = {};
#pragma unroll 4
      for (int i = 0; i < r; ++i) {
        float w[V], u[ROWS];
        load<W, V>(write + int64_t(i) * d + c, w);
        load<float, ROWS>(used + i * ROWS, u);
#pragma unroll
        for (int q = 0; q < ROWS; ++q)
#pragma unroll
          for (int v = 0; v < V; ++v) acc[q][v] = fmaf(u[q], w[v], acc[q][v]);
      }
#pragma unroll
      for (int q = 0; q < ROWS; ++q) {
        if (!(active >> q & 1)) continue;
        if (p.saved_input != nullptr)
          store_pack<T, V>(static_cast<T*>(p.saved_input) + (first_entry + q) * d + c, value[q]);
#pragma unroll
        for (int v = 0; v < V; ++v) acc[q][v] += to_float(value[q].value[v]);
        store<T, V>(static_cast<T*>(p.out) + block.row[q] * p.out_stride + c, acc[q]);
      }
    }
  }  // the first barrier of the next weight set separates these reads from its writes
}

template <class T, class W, int V, int ROWS>
cudaError_t launch(const EditForward& p, cudaStream_t stream) {
  const int r = p.selection.rank;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(ceil_div(p.selection.num_rows, ROWS)));
  config.blockDim = dim3(kProjectThreads);
  config.dynamicSmemBytes = 64 + sizeof(float) * (r * ROWS + 2 * part_size(ROWS, r));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, edit_forward_kernel<T, W, V, ROWS>, p);
}

template <class T, class W>
cudaError_t choose(const EditForward& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vectors = p.selection.d % V == 0 && p.source_stride % V == 0 &&
                       p.out_stride % V == 0 && aligned(p.source, 16) && aligned(p.out, 16) &&
                       aligned(p.saved_input, 16) && aligned(p.read, 16) && aligned(p.write, 16);
  if (!vectors) return launch<T, W, 1, 1>(p, stream);
  return rows_of_block(p.selection.num_rows) == 1 ? launch<T, W, V, 1>(p, stream)
                                                  : launch<T, W, V, 4>(p, stream);
}

}  // namespace

cudaError_t edit_forward(const EditForward& p, cudaStream_t stream) {
  const bool wide = p.weight_dtype == Dtype::kFloat32;
  if (!wide && p.weight_dtype != p.dtype) return cudaErrorInvalidValue;
  if (edit_tiles_serves(p)) return edit_tiles(p, stream);
  if (p.selection.rows == nullptr) return cudaErrorNotSupported;
  switch (p.dtype) {
    case Dtype::kFloat32:
      return choose<float, float>(p, stream);
    case Dtype::kBFloat16:
      return wide ? choose<__nv_bfloat16, float>(p, stream)
                  : choose<__nv_bfloat16, __nv_bfloat16>(p, stream);
    default:
      return wide ? choose<__half, float>(p, stream) : choose<__half, __half>(p, stream);
  }
}

}  // namespace reft_cuda
