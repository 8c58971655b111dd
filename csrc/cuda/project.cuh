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

// The operands of one step of project_warp.
template <class T, class W, int V, int ROWS, int VECTORS, bool FOLD>
struct Operands {
  Pack<T, V> x[ROWS];
  Pack<W, V> w[VECTORS], m[VECTORS];

  __device__ inline void load(const T* const (&from)[ROWS], const W* weights, const W* minus,
                              const int64_t (&offset)[VECTORS], int c) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      w[k] = load_pack<W, V>(weights + offset[k] + c);
      if (FOLD) m[k] = load_pack<W, V>(minus + offset[k] + c);
    }
#pragma unroll
    for (int q = 0; q < ROWS; ++q) x[q] = load_pack<T, V>(from[q] + c);
  }

  __device__ inline void multiply(float (&acc)[ROWS][VECTORS]) const {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float weight = to_float(w[k].value[v]);
        if (FOLD) weight -= to_float(m[k].value[v]);
#pragma unroll
        for (int q = 0; q < ROWS; ++q)
          acc[q][k] = fmaf(to_float(x[q].value[v]), weight, acc[q][k]);
      }
  }
};

template <class T, class W, int V, int ROWS, int VECTORS, bool FOLD>
__device__ inline void project_warp(const T* const (&x)[ROWS], const W* weights, const W* minus,
                                    int count, int d, const WarpGrid& grid, float* part) {
  // As many steps in flight as 128 registers allow
  constexpr int kSteps = (ROWS == 1 ? 4 : 2) / VECTORS;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int slice = warp / grid.width;
  const int step = grid.slices * kWarp * V;
  for (int i = warp % grid.width; i < count; i += grid.width * VECTORS) {
    int64_t offset[VECTORS];
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      int vector = i + k * grid.width;
      offset[k] = int64_t(vector < count ? vector : i) *
                  d;  // past the end, repeat a vector without storing it
    }
    float acc[ROWS][VECTORS] = {};
    int c = (slice * kWarp + lane) * V;
    // One bound check for kSteps steps, because a load does not move above a branch
    for (; d - c > (kSteps - 1) * step; c += kSteps * step) {
      Operands<T, W, V, ROWS, VECTORS, FOLD> operands[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) operands[s].load(x, weights, minus, offset, c + s * step);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) operands[s].multiply(acc);
    }
#pragma unroll 1
    for (; c < d; c += step) {
      Operands<T, W, V, ROWS, VECTORS, FOLD> operands;
      operands.load(x, weights, minus, offset, c);
      operands.multiply(acc);
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
                               int count, int d, float* part) {
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
