// Products of a few selected rows with `rank` weight vectors, used for z in the forward pass and
// delta in the backward pass.
#pragma once

#include "common.cuh"

namespace reft_cuda {

constexpr int kProjectThreads =
    512;  // 16 warps keep enough loads in flight to hide the latency of L2
constexpr int kProjectWarps = kProjectThreads / kWarp;

// The rows of one block, in shared memory. Entries that are skipped or past the end are -1.
template <int ROWS>
struct RowBlock {
  int64_t row[ROWS];
  int32_t set[ROWS];
  static_assert(ROWS <= 4, "one thread of the first warp reads one row");
};

// Loads the rows of a block whose first entry is `first`. All threads must call this function.
template <int ROWS>
__device__ inline void load_rows(RowBlock<ROWS>& block, const Selection& selection, int64_t first) {
  int q = threadIdx.x;
  if (q < ROWS) {
    int64_t n = first + q;
    int32_t row = n < selection.num_rows ? selection.rows[n] : -1;
    block.row[q] = row;
    // weight_ids is undefined for skipped entries
    block.set[q] = row >= 0 && selection.weight_ids != nullptr ? selection.weight_ids[n] : 0;
  }
  __syncthreads();
}

// Returns a mask whose bit q is set if row q is valid.
template <int ROWS>
__device__ inline unsigned valid_rows(const RowBlock<ROWS>& block) {
  unsigned valid = 0;
#pragma unroll
  for (int q = 0; q < ROWS; ++q) valid |= (block.row[q] >= 0 ? 1u : 0u) << q;
  return valid;
}

// Returns a mask whose bit q is set if row q is in `left` and has the same weight set as row
// `lead`.
template <int ROWS>
__device__ inline unsigned rows_of_set(const RowBlock<ROWS>& block, unsigned left, int lead) {
  unsigned same = 0;
#pragma unroll
  for (int q = 0; q < ROWS; ++q) same |= (block.set[q] == block.set[lead] ? 1u : 0u) << q;
  return same & left;
}

// Computes pointers to the rows. For inactive rows it is that of row `lead`, so that the loops
// below need no branches.
template <class T, int ROWS>
__device__ inline void row_pointers(const RowBlock<ROWS>& block, unsigned active, int lead,
                                    const T* base, int64_t stride, const T* (&x)[ROWS]) {
#pragma unroll
  for (int q = 0; q < ROWS; ++q) x[q] = base + block.row[active >> q & 1 ? q : lead] * stride;
}

// Distribution of `count` vectors over the 16 warps: `width` vectors are processed in parallel,
// each by `slices` warps, which share the columns.
struct WarpGrid {
  int width, slices;
  __device__ explicit WarpGrid(int count) : width(1) {
    while (width < count && width < kProjectWarps) width *= 2;
    slices = kProjectWarps / width;
  }
};

// Number of floats in `part`.
__host__ __device__ constexpr int part_size(int rows, int count) {
  return rows * (count > kProjectWarps ? count : kProjectWarps);
}

template <class T, class W, int V, int ROWS, int VECTORS, bool FOLD>
__device__ inline void project_warp(const T* const (&x)[ROWS], const W* weights, const W* minus,
                                    int count, int64_t d, const WarpGrid& grid, float* part) {
  constexpr int kUnroll =
      (ROWS == 1 ? 4 : 2) / VECTORS;  // as many loads in flight as 128 registers allow
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int slice = warp / grid.width;
  const int64_t step = int64_t(grid.slices) * kWarp * V;
  for (int i = warp % grid.width; i < count; i += grid.width * VECTORS) {
    int64_t offset[VECTORS];
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      int vector = i + k * grid.width;
      offset[k] =
          (vector < count ? vector : i) * d;  // past the end, repeat a vector without storing it
    }
    float acc[ROWS][VECTORS] = {};
#pragma unroll kUnroll
    for (int64_t c = int64_t(slice * kWarp + lane) * V; c < d; c += step) {
      float w[VECTORS][V];
#pragma unroll
      for (int k = 0; k < VECTORS; ++k) {
        load<W, V>(weights + offset[k] + c, w[k]);
        if (FOLD) {
          float m[V];
          load<W, V>(minus + offset[k] + c, m);
#pragma unroll
          for (int v = 0; v < V; ++v) w[k][v] -= m[v];
        }
      }
#pragma unroll
      for (int q = 0; q < ROWS; ++q) {
        float value[V];
        load<T, V>(x[q] + c, value);
#pragma unroll
        for (int k = 0; k < VECTORS; ++k)
#pragma unroll
          for (int v = 0; v < V; ++v) acc[q][k] = fmaf(value[v], w[k][v], acc[q][k]);
      }
    }
#pragma unroll
    for (int q = 0; q < ROWS; ++q)
#pragma unroll
      for (int k = 0; k < VECTORS; ++k) {
        float sum = warp_sum(acc[q][k]);
        int vector = i + k * grid.width;
        if (lane == 0 && vector < count) part[(slice * ROWS + q) * count + vector] = sum;
      }
  }
}

// Computes the products of the rows with (weights - minus) [count, d], or without FOLD with
// weights, and stores one sum per slice of the columns in `part`. All threads must call this
// function, and the caller must synchronize before reading `part`.
template <class T, class W, int V, int ROWS, bool FOLD>
__device__ inline void project(const T* const (&x)[ROWS], const W* weights, const W* minus,
                               int count, int64_t d, float* part) {
  WarpGrid grid(count);
  if (count > kProjectWarps)
    project_warp<T, W, V, ROWS, 2, FOLD>(x, weights, minus, count, d, grid, part);
  else
    project_warp<T, W, V, ROWS, 1, FOLD>(x, weights, minus, count, d, grid, part);
}

// Returns the product of row q with vector i, with the slices added in order.
template <int ROWS>
__device__ inline float projected(const float* part, int count, int q, int i) {
  const int slices = WarpGrid(count).slices;
  float sum = part[q * count + i];
  for (int slice = 1; slice < slices; ++slice) sum += part[(slice * ROWS + q) * count + i];
  return sum;
}

// Returns the number of rows per block: one if the rows cannot fill a large GPU twice, otherwise
// four, which share one read of the weights from L2. Not tuned on a GPU yet.
inline int rows_of_block(int64_t num_rows) { return num_rows <= 264 ? 1 : 4; }

}  // namespace reft_cuda
