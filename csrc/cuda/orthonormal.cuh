// Shared parts of the orthonormal maps' forward and backward kernels: staging, Gram sums, r x r
// operations in fp64, and the launch.
//
// The kernels store V without its unit diagonal, which is then exact. With E the first r columns of
// the identity:
//
//     F = L M + E P, with F(0) = E
//     householder: L = strictly lower part of X, V = E + L, V^T V = I + L[:r] + L[:r]^T + L^T L
//     cayley:      L = V = [0; X[r:]]
//
// Each layer is processed by `splits` consecutive blocks. Each block computes partial Gram sums
// over its own rows. After a barrier among the blocks of the layer, every block adds the partial
// sums in the order of the splits, performs the r x r operations itself and writes its own rows.
// The splits form a thread-block cluster if the device supports clusters, otherwise a cooperative
// launch is used.
#pragma once

#include <cooperative_groups.h>

#include "common.cuh"

namespace reft_cuda {

constexpr int kBuildThreads = 256;
constexpr int kBuildWarps = kBuildThreads / kWarp;
constexpr int kStageElements = 4096;  // elements of a staged tile, 16 per thread
constexpr int kSharedRank =
    32;  // r x r matrices are in shared memory up to this rank, otherwise in scratch memory

// Tiles [rows, size] of kStageElements elements. size covers the rank if possible.
struct Tiling {
  int shift, size, rows;
  __host__ __device__ constexpr explicit Tiling(int r) : shift(3), size(0), rows(0) {
    while ((1 << shift) < r && shift < 6) ++shift;
    size = 1 << shift;
    rows = kStageElements >> shift;
  }
  // Size of a tile with padding. Two tiles also hold the 16 * kBuildThreads fp64 sums of gram().
  __host__ __device__ constexpr int floats() const { return rows * (size + 4); }
};

// Row stride of an r x r fp64 matrix. It is odd to avoid bank conflicts in shared memory.
__host__ __device__ constexpr int matrix_stride(int r) { return r | 1; }
__host__ __device__ constexpr int64_t matrix_size(int r) { return int64_t(r) * matrix_stride(r); }

constexpr size_t build_shared_bytes(int r, int matrices) {
  return sizeof(float) * 2 * Tiling(r).floats() +
         sizeof(double) * (2 * kMaxRank + (r <= kSharedRank ? matrices * matrix_size(r) : 0));
}

// Shared memory per block on every GPU from sm_80.
constexpr size_t kSharedLimit = 99 * 1024;

// The part of the computation that one block performs, and its memory.
struct Build {
  int d, r, stride;
  int splits, split;
  int first, last;         // range of rows of X that this block processes
  float *arena, *second;   // shared: two staged tiles
  double* pivot;           // shared, 2 * kMaxRank
  double* matrices;        // matrices of this block, matrix_size(r) each
  double* partials;        // partial sums of this block; `matrices` if other blocks can read it
  int64_t partials_pitch;  // distance between the partial sums of two splits in global memory
  bool distributed;        // whether the partial sums are in the cluster's shared memory

  __device__ double* matrix(int which) const { return matrices + which * matrix_size(r); }
};

// `matrices` is the number of r x r matrices that a block uses. The first `shared_out` of them are
// partial sums that other blocks read.
__device__ inline Build make_build(int d, int r, int splits, int chunk, int matrices,
                                   int shared_out, double* scratch) {
  Build b;
  b.d = d;
  b.r = r;
  b.stride = matrix_stride(r);
  b.splits = splits;
  b.split = blockIdx.x % splits;
  b.first = b.split * chunk;
  b.last = min(b.first + chunk, d);
  b.arena = dynamic_shared<float>();
  const int tile = Tiling(r).floats();
  b.second = b.arena + tile;
  b.pivot = reinterpret_cast<double*>(b.second + tile);
  const bool in_shared = r <= kSharedRank;
  b.matrices = in_shared ? b.pivot + 2 * kMaxRank
                         : scratch + int64_t(blockIdx.x) * matrices * matrix_size(r);
  b.partials = b.matrices;
  b.partials_pitch = matrices * matrix_size(r);
  b.distributed = in_shared && splits > 1;
#if __CUDA_ARCH__ < 900
  if (b.distributed) {  // distributed shared memory is not available, so use global memory
    b.distributed = false;
    b.partials_pitch = shared_out * matrix_size(r);
    b.partials = scratch + int64_t(blockIdx.x) * b.partials_pitch;
  }
#endif
  return b;
}

// Waits until all blocks of the layer have written their partial sums.
__device__ inline void sync_layer(const Build& b) {
  if (b.splits == 1) {
    __syncthreads();
    return;
  }
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  cooperative_groups::this_grid().sync();
#endif
}

// Waits until no other block reads the shared memory of this block.
__device__ inline void leave_layer(const Build& b) {
#if __CUDA_ARCH__ >= 900
  if (b.distributed) cooperative_groups::this_cluster().sync();
#endif
}

// Calls f(i, j) for each entry of an r x r matrix, distributed over the threads.
template <class F>
__device__ inline void each_entry(int r, F f) {
  for (int i = threadIdx.x / kWarp; i < r; i += kBuildWarps)
    for (int j = threadIdx.x % kWarp; j < r; j += kWarp) f(i, j);
}

// Returns entry (i, j) of partial sum `which`, added over the splits in order.
__device__ inline double sum_partials(const Build& b, int which, int i, int j) {
  const int64_t at = which * matrix_size(b.r) + i * b.stride + j;
  double sum = 0.0;
  for (int q = 0; q < b.splits; ++q) {
    const double* from = b.partials + (q - b.split) * b.partials_pitch;
#if __CUDA_ARCH__ >= 900
    if (b.distributed) from = cooperative_groups::this_cluster().map_shared_rank(b.partials, q);
#endif
    sum += from[at];
  }
  return sum;
}

// The strictly lower part of A [d, r], or [0; A[r:]] if `below` is set.
struct LowerPart {
  const float* A;
  bool below;

  __device__ bool operator==(const LowerPart& other) const {
    return A == other.A && below == other.below;
  }

  // Sets to[rr * stride + c] to entry (row0 + rr, col0 + c), or 0 outside the matrix. Adjacent
  // threads load adjacent columns.
  __device__ void stage(float* to, int stride, const Build& b, const Tiling& tiling, int row0,
                        int col0) const {
    float value[8];
#pragma unroll 1  // 16 loads in flight would cause register spills
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        const int e = (half * 8 + s) * kBuildThreads + threadIdx.x;
        const int row = row0 + (e >> tiling.shift), col = col0 + (e & (tiling.size - 1));
        const bool keep = row < b.last && col < b.r && (below ? row >= b.r : row > col);
        value[s] = keep ? A[int64_t(row) * b.r + col] : 0.0f;
      }
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        const int e = (half * 8 + s) * kBuildThreads + threadIdx.x;
        to[(e >> tiling.shift) * stride + (e & (tiling.size - 1))] = value[s];
      }
    }
  }
};

// The matrix (grad_R - grad_D)^T, where both are [r, d] or null.
struct TotalGradient {
  const float *grad_R, *grad_D;

  __device__ bool operator==(const LowerPart&) const { return false; }

  __device__ float entry(const Build& b, int row, int col) const {
    const int64_t at = int64_t(col) * b.d + row;
    float value = grad_R != nullptr ? grad_R[at] : 0.0f;
    return grad_D != nullptr ? value - grad_D[at] : value;
  }

  // As LowerPart::stage, but adjacent threads load adjacent rows.
  __device__ void stage(float* to, int stride, const Build& b, const Tiling& tiling, int row0,
                        int col0) const {
    float value[8];
#pragma unroll 1  // 16 loads in flight would cause register spills
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        const int e = (half * 8 + s) * kBuildThreads + threadIdx.x;
        const int row = row0 + (e & (tiling.rows - 1)), col = col0 + (e >> (12 - tiling.shift));
        value[s] = row < b.last && col < b.r ? entry(b, row, col) : 0.0f;
      }
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        const int e = (half * 8 + s) * kBuildThreads + threadIdx.x;
        to[(e & (tiling.rows - 1)) * stride + (e >> (12 - tiling.shift))] = value[s];
      }
    }
  }
};
static_assert(kStageElements == 1 << 12 && kStageElements == 16 * kBuildThreads,
              "stage() takes 16 elements a thread");

// Adds x[i] * y[j] to sums[i][j] for four staged values each, in the precision of the sums.
template <class Sum>
__device__ inline void add_products(const float* from_x, const float* from_y, Sum (&sums)[4][4]) {
  float x[4], y[4];
  load<float, 4>(from_x, x);
  load<float, 4>(from_y, y);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = fma(Sum(x[i]), Sum(y[j]), sums[i][j]);
}

// Computes A^T B [r, r] over the block's rows in fp64. The first r rows, whose entries are not
// small compared with the unit diagonal, are summed in fp64; the other rows are summed in fp32 in
// groups of at most 64. A thread computes 4 x 4 entries. If a tile has fewer than 16 x 16 of these
// patches, several threads share a patch, each for some of the rows, and their sums are added in
// order. Ends with a barrier.
template <class Left, class Right>
__device__ inline void gram(const Build& b, const Left& A, const Right& B, double* out) {
  const Tiling tiling(b.r);
  const int stride = tiling.size + 4;  // float4 accesses stay aligned
  const int per_side = tiling.size / 4, patches = per_side * per_side,
            groups = kBuildThreads / patches;
  const int patch = threadIdx.x % patches, group = threadIdx.x / patches;
  const int pi = patch / per_side * 4, pj = patch % per_side * 4;
  float* left = b.arena;
  double* sums = reinterpret_cast<double*>(b.arena);  // [16, threads], reuses the tiles' memory
  for (int i0 = 0; i0 < b.r; i0 += tiling.size)
    for (int j0 = 0; j0 < b.r; j0 += tiling.size) {
      const bool same = B == A && i0 == j0;
      float* right = same ? left : b.second;
      double total[4][4] = {};
      for (int row0 = b.first; row0 < b.last; row0 += tiling.rows) {
        A.stage(left, stride, b, tiling, row0, i0);
        if (!same) B.stage(right, stride, b, tiling, row0, j0);
        __syncthreads();
        const int top = min(b.r - row0, tiling.rows);
        int row = group;
        for (; row < top; row += groups)
          add_products(left + row * stride + pi, right + row * stride + pj, total);
        float acc[4][4] = {};
        for (; row < tiling.rows; row += groups)
          add_products(left + row * stride + pi, right + row * stride + pj, acc);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) total[i][j] += double(acc[i][j]);
        __syncthreads();
      }
#pragma unroll
      for (int k = 0; k < 16; ++k) sums[k * kBuildThreads + threadIdx.x] = total[k / 4][k % 4];
      __syncthreads();
      for (int e = threadIdx.x; e < tiling.size * tiling.size; e += kBuildThreads) {
        const int i = e >> tiling.shift, j = e & (tiling.size - 1);
        const double* from =
            sums + (i % 4 * 4 + j % 4) * kBuildThreads + (i / 4) * per_side + j / 4;
        double sum = 0.0;
        for (int g = 0; g < groups; ++g) sum += from[g * patches];
        if (i0 + i < b.r && j0 + j < b.r) out[(i0 + i) * b.stride + j0 + j] = sum;
      }
      __syncthreads();
    }
}

// Calls store(i, j, sum over k of left(i, k) * right(k, j)) for each entry, in fp64, in patches of
// 2 x 2. Has no barrier.
template <class Left, class Right, class Store>
__device__ inline void product(int r, Left left, Right right, Store store) {
  const int per_side = (r + 1) / 2;
  for (int patch = threadIdx.x; patch < per_side * per_side; patch += kBuildThreads) {
    const int i0 = patch / per_side * 2, j0 = patch % per_side * 2;
    const int i1 = min(i0 + 1, r - 1), j1 = min(j0 + 1, r - 1);
    double s00 = 0.0, s01 = 0.0, s10 = 0.0, s11 = 0.0;
    for (int k = 0; k < r; ++k) {
      const double x0 = left(i0, k), x1 = left(i1, k), y0 = right(k, j0), y1 = right(k, j1);
      s00 = fma(x0, y0, s00);
      s01 = fma(x0, y1, s01);
      s10 = fma(x1, y0, s10);
      s11 = fma(x1, y1, s11);
    }
    store(i0, j0, s00);
    if (j1 > j0) store(i0, j1, s01);
    if (i1 > i0) store(i1, j0, s10);
    if (i1 > i0 && j1 > j0) store(i1, j1, s11);
  }
}

// Inverts A in place by Gauss-Jordan elimination without pivoting, which is stable for triangular A
// and for A with positive definite symmetric part. Must be called after a barrier; ends with one.
__device__ inline void invert(const Build& b, double* A) {
  double *row = b.pivot, *column = b.pivot + kMaxRank;
  for (int k = 0; k < b.r; ++k) {
    const double pivot = A[k * b.stride + k];
    for (int j = threadIdx.x; j < b.r; j += kBuildThreads) {
      row[j] = (j == k ? 1.0 : A[k * b.stride + j]) / pivot;
      column[j] = j == k ? -1.0 : A[j * b.stride + k];
    }
    __syncthreads();
    each_entry(b.r, [&](int i, int j) {
      double& entry = A[i * b.stride + j];
      entry = (i == k || j == k ? 0.0 : entry) - column[i] * row[j];
    });
    __syncthreads();
  }
}

// The part of an output tile that a thread computes: 4 columns j, and 4 rows c of X at a distance
// of `step`.
struct Patch {
  int j, c, step;
  // With rows_first, adjacent threads process adjacent rows c, otherwise adjacent columns j.
  __device__ Patch(const Tiling& tiling, bool rows_first) : step(tiling.rows / 4) {
    const int across = tiling.size / 4;
    j = (rows_first ? threadIdx.x / step : threadIdx.x % across) * 4;
    c = rows_first ? threadIdx.x % step : threadIdx.x / across;
  }
};

// Adds the sum over k of A(row0 + c, k) * matrix(k, j0 + j) to acc[j][c] in fp32, tile by tile,
// because a single sum over 255 ranks is not accurate enough. Must be called after a barrier; ends
// with one.
template <class Tall, class Matrix>
__device__ inline void multiply_square(const Build& b, const Tiling& tiling, const Patch& patch,
                                       int row0, int j0, const Tall& A, Matrix matrix,
                                       float (&acc)[4][4]) {
  const int stride = tiling.size + 1;
  float *tall = b.arena, *square = b.second;
  for (int k0 = 0; k0 < b.r; k0 += tiling.size) {
    A.stage(tall, stride, b, tiling, row0, k0);
    for (int e = threadIdx.x; e < tiling.size * tiling.size; e += kBuildThreads) {
      const int k = k0 + (e >> tiling.shift), j = j0 + (e & (tiling.size - 1));
      square[e] = k < b.r && j < b.r ? float(matrix(k, j)) : 0.0f;
    }
    __syncthreads();
    const int count = min(tiling.size, b.r - k0);
    float part[4][4] = {};
    for (int k = 0; k < count; ++k) {
      float m[4];
      load<float, 4>(square + k * tiling.size + patch.j, m);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float a = tall[(patch.c + q * patch.step) * stride + k];
#pragma unroll
        for (int j = 0; j < 4; ++j) part[j][q] = fmaf(a, m[j], part[j][q]);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) acc[j][q] += part[j][q];
    __syncthreads();
  }
}

// Returns the sign of column j, negated with `negate` (the product of reflectors is -F).
__device__ inline double column_sign(const float* signs, int j, bool negate) {
  const double sign = signs != nullptr ? double(signs[j]) : 1.0;
  return negate ? -sign : sign;
}

// ---- Host code

constexpr int kMaxSplits = 8;  // the maximum portable cluster size
constexpr int kSplitRows =
    256;  // minimum rows per split; fewer would not pay for the barriers. Not tuned on a GPU yet.
constexpr int64_t kMaxScratch =
    int64_t(64) << 20;  // bytes; a large rank uses fewer blocks instead of more memory

// Returns the number of rows of X per split.
inline int split_rows(int d, int splits) {
  return int(ceil_div(ceil_div(d, splits), kWarp) * kWarp);
}

// Computes the launch configuration. `matrices` and `shared_out` are as in make_build.
template <class Kernel>
cudaError_t make_plan(Kernel kernel, int layers, int d, int r, int matrices, int shared_out,
                      BuildPlan* plan) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaFuncAttributes attributes = {};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  plan->clusters =
      attributes.ptxVersion >= 90;  // whether the code for this device was compiled for clusters
  const bool in_shared = r <= kSharedRank;
  plan->splits = 1;
  const auto scratch = [&](int splits) {
    if (in_shared && (splits == 1 || plan->clusters)) return int64_t(0);
    return int64_t(sizeof(double)) * layers * splits * matrix_size(r) *
           (in_shared ? shared_out : matrices);
  };
  // Powers of two. All blocks of a layer must be resident at once, and no split may be empty.
  for (int splits = 2; splits <= kMaxSplits; splits *= 2) {
    if (int64_t(layers) * splits > processors || int64_t(splits) * kSplitRows > d ||
        scratch(splits) > kMaxScratch)
      break;
    if (int64_t(splits - 1) * split_rows(d, splits) < d) plan->splits = splits;
  }
  plan->scratch_bytes = scratch(plan->splits);
  return cudaSuccess;
}

template <class Kernel, class Arguments>
cudaError_t launch_build(Kernel kernel, const Arguments& p, const BuildPlan& plan, int matrices,
                         void* scratch, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(p.layers) * plan.splits);
  config.blockDim = dim3(kBuildThreads);
  config.dynamicSmemBytes = build_shared_bytes(p.rank, matrices);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (plan.clusters) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.splits;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = plan.splits > 1 ? 1 : 0;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(config.dynamicSmemBytes));
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, kernel, p, plan.splits, split_rows(p.d, plan.splits),
                            static_cast<double*>(scratch));
}

}  // namespace reft_cuda
