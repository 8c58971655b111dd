// Products of a few selected rows with `rank` weight vectors: what z of the forward and delta of
// the backward have in common.
#pragma once

#include "common.cuh"

namespace reft_cuda {

constexpr int kProjectThreads =
    512;  // 16 warps keep enough loads in flight to hide the latency of the L2 that holds weights
constexpr int kProjectWarps = kProjectThreads / kWarp;

// The rows of one block, in shared memory: entry -1 is skipped or past the end.
template <int ROWS>
struct RowBlock {
  int64_t row[ROWS];
  int32_t set[ROWS];
  static_assert(ROWS <= 4, "one thread of the first warp reads one row");
};

// Fills the block's rows; every thread must call it. `first` is the number of its first entry.
template <int ROWS>
__device__ inline void load_rows(RowBlock<ROWS>& block, const Selection& selection, int64_t first) {
  int q = threadIdx.x;
  if (q < ROWS) {
    int64_t n = first + q;
    int32_t row = n < selection.num_rows ? selection.rows[n] : -1;
    block.row[q] = row;
    // the set of a skipped entry is not defined
    block.set[q] = row >= 0 && selection.weight_ids != nullptr ? selection.weight_ids[n] : 0;
  }
  __syncthreads();
}

// Bit q: row q is served.
template <int ROWS>
__device__ inline unsigned valid_rows(const RowBlock<ROWS>& block) {
  unsigned valid = 0;
#pragma unroll
  for (int q = 0; q < ROWS; ++q) valid |= (block.row[q] >= 0 ? 1u : 0u) << q;
  return valid;
}

// Bit q: row q is among `left` and has the weight set of row `lead`.
template <int ROWS>
__device__ inline unsigned rows_of_set(const RowBlock<ROWS>& block, unsigned left, int lead) {
  unsigned same = 0;
#pragma unroll
  for (int q = 0; q < ROWS; ++q) same |= (block.set[q] == block.set[lead] ? 1u : 0u) << q;
  return same & left;
}

// Pointers to the rows; a row that is not active repeats `lead`, so that the loops below have no
// branches.
template <class T, int ROWS>
__device__ inline void row_pointers(const RowBlock<ROWS>& block, unsigned active, int lead,
                                    const T* base, int64_t stride, const T* (&x)[ROWS]) {
#pragma unroll
  for (int q = 0; q < ROWS; ++q) x[q] = base + block.row[active >> q & 1 ? q : lead] * stride;
}

// How the 16 warps share `count` vectors: `width` of them in parallel, each over 1 / `slices` of
// the columns.
struct WarpGrid {
  int width, slices;
  __device__ explicit WarpGrid(int count) : width(1) {
    while (width < count && width < kProjectWarps) width *= 2;
    slices = kProjectWarps / width;
  }
};

// Floats of `part` below.
__host__ __device__ constexpr int part_size(int rows, int count) {
  return rows * (count > kProjectWarps ? count : kProjectWarps);
}

template <class T, class W, int V, int ROWS, int VECTORS, bool FOLD>
__device__ inline void project_warp(const T* const (&x)[ROWS], const W* weights, const W* minus,
                                    int count, int64_t d, const WarpGrid& grid, float* part) {
  constexpr int kUnroll =
      (ROWS == 1 ? 4 : 2) / VECTORS;  // loads in flight, within 128 registers a thread
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int slice = warp / grid.width;
  const int64_t step = int64_t(grid.slices) * kWarp * V;
  for (int i = warp % grid.width; i < count; i += grid.width * VECTORS) {
    int64_t offset[VECTORS];
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      int vector = i + k * grid.width;
      offset[k] =
          (vector < count ? vector : i) * d;  // past the end: a repetition that is not stored
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

// part <- the products of the rows with (weights - minus)[count, d] (without FOLD: with weights),
// one sum for each slice of the columns. Every thread must call it; the caller synchronises before
// it reads `part`.
template <class T, class W, int V, int ROWS, bool FOLD>
__device__ inline void project(const T* const (&x)[ROWS], const W* weights, const W* minus,
                               int count, int64_t d, float* part) {
  WarpGrid grid(count);
  if (count > kProjectWarps)
    project_warp<T, W, V, ROWS, 2, FOLD>(x, weights, minus, count, d, grid, part);
  else
    project_warp<T, W, V, ROWS, 1, FOLD>(x, weights, minus, count, d, grid, part);
}

// The product of row q with vector i, its slices added in order.
template <int ROWS>
__device__ inline float projected(const float* part, int count, int q, int i) {
  const int slices = WarpGrid(count).slices;
  float sum = part[q * count + i];
  for (int slice = 1; slice < slices; ++slice) sum += part[(slice * ROWS + q) * count + i];
  return sum;
}

// Rows of a block: one while rows are too few to fill a large GPU twice, then four, which read the
// weights once for all. Reasoned from bytes (a block reads the weights whole from L2), not
// measured.
inline int rows_of_block(int64_t num_rows) { return num_rows <= 264 ? 1 : 4; }

}  // namespace reft_cuda
