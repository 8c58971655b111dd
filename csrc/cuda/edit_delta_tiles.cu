// First launch of the edit's backward pass, as edit_delta.cu, for rows that use one set of weights
// in half precision: delta = B g by the products of tiles.cuh, which read the weights once for all
// tiles of a cluster.
#include "tiles.cuh"

namespace reft_cuda {
namespace {

constexpr int kStages = 2;  // tiles in flight

// Writes the results of 8 ranks, of which the lane has four: two ranks of two rows.
__device__ inline void write_results(const EditDelta& p, int count, int tile, int first_rank,
                                     const int32_t (&row)[2], const float (&delta)[4]) {
  const int r = p.selection.rank, padded = padded_rank(r), lane = threadIdx.x % kWarp;
  const int i = first_rank + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t n = int64_t(tile) * kTileRows + half * 8 + lane / 4;
    if (n >= p.selection.num_rows) continue;
    float dz[2] = {}, used[2] = {}, ddelta[2] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (i + k >= r) continue;
      const int64_t at = n * r + i + k;
      if (row[half] < 0) {  // of skipped entries all results are zero, u is not read
        if (p.grad_coeff != nullptr) p.grad_coeff[at] = 0.0f;
        continue;
      }
      const float u = p.u[at];
      ddelta[k] = delta[2 * half + k];
      used[k] = u;
      if (p.coeff.data != nullptr) {
        const float coeff = load_any(p.coeff, at);
        p.grad_coeff[at] = u * ddelta[k];
        ddelta[k] *= coeff;
        used[k] *= coeff;
      }
      dz[k] = ddelta[k];
      if (p.z != nullptr) dz[k] *= activation_derivative(p.z[at], p.activation);
    }
    float* small = p.small + n * count * padded + i;
    store<float, 2>(small, dz);
    store<float, 2>(small + padded, used);
    if (count == 3) store<float, 2>(small + 2 * padded, ddelta);
  }
}

template <class T, int TILES>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1)
    edit_delta_tiles_kernel(const EditDelta p, int count, int blocks) {
  const Selection& selection = p.selection;
  const int d = selection.d, warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int block = blockIdx.x % blocks;
  const int cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  const int first_column = (block * warps + warp) * kWarpColumns;
  const int tiles = int(ceil_div(selection.num_rows, kTileRows));
  const T* grad = static_cast<const T*>(p.grad);

  RowTile g[kStages];
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    int32_t row[2];
    load_row_numbers(selection, cluster + s * clusters, row);
    load_tile<T>(grad, p.grad_stride, d, row, first_column, g[s]);
  }
  ReadWeights<T, TILES> weights;
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    if (p.weight_dtype == Dtype::kFloat32)
      weights.template load<float>(static_cast<const float*>(p.write), nullptr, t, t * kRanks,
                                   selection.rank, d, first_column);
    else
      weights.template load<T>(static_cast<const T*>(p.write), nullptr, t, t * kRanks,
                               selection.rank, d, first_column);
  }
  ClusterSum<TILES, 0> sum(blocks, block);

  for (int next = cluster; next < tiles;) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      const int tile = next;
      if (tile >= tiles) break;
      next += clusters;
      int32_t later_row[2];
      load_row_numbers(selection, tile + kStages * clusters, later_row);
      float delta[TILES][4];
      weights.template multiply<true>(g[s], delta);
      sum.add(delta);
      if (warp == 0) {
#pragma unroll
        for (int t = 0; t < TILES; ++t)
          if (block == t % blocks) write_results(p, count, tile, t * kRanks, g[s].row, delta[t]);
      }
      load_tile<T>(grad, p.grad_stride, d, later_row, first_column, g[s]);
    }
  }
}

static_assert(ClusterSum<2, 0>::bytes(kMaxBlocks, kTileWarps) <= 48 * 1024);

template <class T, int TILES>
cudaError_t launch(const EditDelta& p, int count, cudaStream_t stream) {
  return launch_tiles(edit_delta_tiles_kernel<T, TILES>, p.selection, ClusterSum<TILES, 0>::bytes,
                      stream, p, count);
}

template <class T>
cudaError_t choose(const EditDelta& p, int count, cudaStream_t stream) {
  return p.selection.rank <= kRanks ? launch<T, 1>(p, count, stream)
                                    : launch<T, 2>(p, count, stream);
}

}  // namespace

bool edit_delta_tiles_serves(const EditDelta& p) {
  return p.dtype != Dtype::kFloat32 && p.grad_stride % 8 == 0 && aligned(p.grad, 16) &&
         aligned(p.write, 16) && tiles_serve(p.selection, 2 * kRanks);
}

cudaError_t edit_delta_tiles(const EditDelta& p, int count, cudaStream_t stream) {
  return p.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(p, count, stream)
                                     : choose<__half>(p, count, stream);
}

}  // namespace reft_cuda
