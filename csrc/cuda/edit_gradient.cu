// Second launch of the edit's backward pass: dh = g + A^T dz - B^T ddelta and the gradients of the
// weights
//
//     dA = dz^T x     dB = (coeff * u)^T g - ddelta^T x     dc = sum dz     dp = -sum ddelta
//
// A block processes 32 or 64 columns of one weight set and all rows. Each of its 16 warps processes
// some of the rows, four at a time, with fp32 sums for eight ranks. Aligned rows pass through a
// ring of buffers in shared memory, which a warp fills and reads alone. The sums of the warps are
// added in a fixed order, without atomics. Each row of g is read and written by one warp, so dh may
// overwrite g. An additional block per weight set computes dc and dp.
#include "common.cuh"

namespace reft_cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 4;   // rows per step of a warp
constexpr int kAhead = kWarp / kRows;  // steps whose row numbers a warp fetches at once
constexpr int kRanks = 8;  // ranks per pass over the rows

__device__ inline bool belongs(const Selection& selection, int64_t n, int set) {
  if (n >= selection.num_rows || selection.rows[n] < 0) return false;
  return selection.weight_ids == nullptr || selection.weight_ids[n] == set;
}

// Computes dc and dp of one weight set. The sums are few, so they are accumulated in fp64.
__device__ inline void sum_biases(const EditGradient& p, int set) {
  const Selection& selection = p.selection;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int r = selection.rank, padded = padded_rank(r),
            count = small_count(p.subtract_projection, p.linear);
  double* sums = dynamic_shared<double>();  // [2, warps, 32]
  for (int first = 0; first < r; first += kWarp) {
    const int i = first + lane;
    double dz = 0.0, ddelta = 0.0;
#pragma unroll 4
    for (int64_t n = warp; n < selection.num_rows; n += kWarps) {
      if (i >= r || !belongs(selection, n, set)) continue;
      const float* small = p.small + n * count * padded + i;
      dz += double(small[0]);
      if (count == 3) ddelta += double(small[2 * padded]);
    }
    sums[warp * kWarp + lane] = dz;
    sums[(kWarps + warp) * kWarp + lane] = ddelta;
    __syncthreads();
    if (warp == 0 && i < r) {
      dz = ddelta = 0.0;
      for (int w = 0; w < kWarps; ++w) {
        dz += sums[w * kWarp + lane];
        ddelta += sums[(kWarps + w) * kWarp + lane];
      }
      const int64_t at = int64_t(set) * r + i;
      p.grad_read_bias[at] = float(dz);
      if (p.subtract_projection) p.grad_subtract_bias[at] = -float(p.linear ? dz : ddelta);
    }
    __syncthreads();
  }
}

// Returns row[q] without an indexed access, which would move the array to local memory.
__device__ inline int32_t row_of(const int32_t (&row)[kRows], int q) {
  int32_t found = row[0];
#pragma unroll
  for (int k = 1; k < kRows; ++k) found = q == k ? row[k] : found;
  return found;
}

template <int V>
__device__ inline void zero(float (&to)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = 0.0f;
}

// Loads eight consecutive values of one row, the same in each lane; zeros if `given` is false.
__device__ inline void load_ranks(const float* from, bool given, float (&to)[kRanks]) {
  load<float, kRanks>(from, to);
#pragma unroll
  for (int k = 0; k < kRanks; ++k) to[k] = given ? to[k] : 0.0f;
}

// Returns the sum over warps of element e = k * 32 * V + column, added in order.
template <int V>
__device__ inline float sum_warps(const float* sums, int e) {
  constexpr int kTile = kRanks * kWarp * V;
  float total = sums[e];
  for (int w = 1; w < kWarps; ++w) total += sums[w * kTile + e];
  return total;
}

// Returns, in lane l, the row number of row l % 4 of step `first + l / 4` of this warp, or -1 if the
// row is not selected or uses another weight set.
__device__ inline int32_t fetch_rows(const Selection& selection, int set, int64_t first) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t n = ((first + lane / kRows) * kWarps + warp) * kRows + lane % kRows;
  if (n >= selection.num_rows) return -1;
  const int32_t row = selection.rows[n];
  // weight_ids is undefined for skipped entries, but may be read
  const bool same = selection.weight_ids == nullptr || selection.weight_ids[n] == set;
  return same ? row : -1;
}

// A ring of buffers [4, columns] for rows of g and x, in the memory of the warp's sums, which are
// written when the rows have been read.
template <class T, int V>
struct Ring {
  static constexpr int kColumns = kWarp * V, kElements = kRows * kColumns,
                       kPiece = 16 / sizeof(T),      // elements of a copy
                       kPieces = kElements / kPiece,  // copies of a buffer
                       kStages = kRanks * kColumns * sizeof(float) / (kElements * sizeof(T));
  static_assert(kStages >= 2 && kPieces % 16 == 0);
  T *g, *x;

  __device__ T* of_g(int step) const { return g + step % kStages * kElements; }
  __device__ T* of_x(int step) const { return x + step % kStages * kElements; }
};

template <class T, int V, bool SECOND, bool RING>
__global__ void __launch_bounds__(kThreads, 1) edit_gradient_kernel(const EditGradient p) {
  constexpr int kColumns = kWarp * V, kTile = kRanks * kColumns;
  const Selection& selection = p.selection;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int set = blockIdx.y, r = selection.rank, padded = padded_rank(r);
  const int64_t d = selection.d, first_column = int64_t(blockIdx.x) * kColumns;
  const bool needs_weights = p.grad_write != nullptr;
  if (first_column >= d) {  // the additional block
    sum_biases(p, set);
    return;
  }
  const bool fold = p.subtract_projection && !SECOND;
  const bool first = p.read.data != nullptr || fold;  // whether dh and dA have terms with dz
  const bool needs_x = needs_weights && (first || SECOND);
  constexpr int kCount = SECOND ? 3 : 2;

  float* sums_a = dynamic_shared<float>();  // [warps, 8, columns]
  float* sums_b = sums_a + kWarps * kTile;
  float* tile_a = sums_b + kWarps * kTile;     // [padded, columns]: A, A - B or -B
  float* tile_b = tile_a + padded * kColumns;  // [padded, columns]: B, with SECOND
  if (p.out != nullptr) {
    for (int e = threadIdx.x; e < padded * kColumns; e += kThreads) {
      const int i = e / kColumns;
      const int64_t c = first_column + e % kColumns;
      float a = 0.0f, b = 0.0f;
      if (i < r && c < d) {
        const int64_t at = (int64_t(set) * r + i) * d + c;
        if (p.read.data != nullptr) a = load_any(p.read, at);
        if (p.subtract_projection) b = load_any(p.write, at);
      }
      tile_a[e] = fold ? a - b : a;
      if (SECOND) tile_b[e] = b;
    }
    __syncthreads();
  }

  const int64_t c = first_column + lane * V;
  const bool inside = c < d;  // d is a multiple of V
  const int passes = needs_weights ? padded / kRanks : 1;
  constexpr int kStages = RING ? Ring<T, V>::kStages : 1;
  const Ring<T, V> ring{reinterpret_cast<T*>(sums_a + warp * kTile),
                        reinterpret_cast<T*>(sums_b + warp * kTile)};
  const int steps =
      int((selection.num_rows - warp * kRows + kWarps * kRows - 1) / (kWarps * kRows));
  for (int pass = 0; pass < passes; ++pass) {
    float acc_a[kRanks][V] = {}, acc_b[kRanks][V] = {};
    int32_t fetched = fetch_rows(selection, set, 0), next = fetch_rows(selection, set, kAhead);
    // Starts the copies of a step, whose rows are in `fetched` or in `next`
    const auto copy = [&](int step, bool is_next) {
      if constexpr (RING) {
#pragma unroll
        for (int e = lane; e < 2 * Ring<T, V>::kPieces; e += kWarp) {
          const bool of_x = e >= Ring<T, V>::kPieces;
          const int at = e % Ring<T, V>::kPieces * Ring<T, V>::kPiece, q = at / kColumns;
          const int from = step % kAhead * kRows + q;
          const int32_t row = __shfl_sync(0xffffffffu, is_next ? next : fetched, from);
          const int64_t column = first_column + at % kColumns;
          if (row < 0 || column >= d || (of_x && !needs_x)) continue;
          const int64_t n = int64_t(step * kWarps + warp) * kRows + q;
          if (of_x)
            copy_async(ring.of_x(step) + at,
                       static_cast<const T*>(p.saved_input) + n * p.kept_stride + column);
          else
            copy_async(ring.of_g(step) + at,
                       static_cast<const T*>(p.grad) + int64_t(row) * p.grad_stride + column);
        }
        commit_copies();
      }
    };
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) copy(step, false);
#pragma unroll 1  // unrolling causes register spills
    for (int step = 0; step < steps; ++step) {
      const int64_t n0 = int64_t(step * kWarps + warp) * kRows;
      bool mine[kRows];
      int32_t row[kRows];
      const float* small = p.small + n0 * kCount * padded;
      int at_row[kRows];  // offset in `small`; that of the first row, which is always valid, for
                          // rows that are not used
      float g[kRows][V], x[kRows][V];
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        row[q] = __shfl_sync(0xffffffffu, fetched, step % kAhead * kRows + q);
        mine[q] = row[q] >= 0;
        at_row[q] = mine[q] ? q * kCount * padded : 0;
      }
      copy(step + kStages - 1, step % kAhead + kStages - 1 >= kAhead);
      if (step % kAhead == kAhead - 1) {
        fetched = next;
        next = fetch_rows(selection, set, step + 1 + kAhead);
      }
      if constexpr (RING) {
        wait_copies<kStages - 1>();
        __syncwarp();
      }
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        zero(g[q]);
        zero(x[q]);
        if (!mine[q] || !inside) continue;
        if constexpr (RING) {
          load<T, V>(ring.of_g(step) + q * kColumns + lane * V, g[q]);
          if (needs_x) load<T, V>(ring.of_x(step) + q * kColumns + lane * V, x[q]);
        } else {
          load<T, V>(static_cast<const T*>(p.grad) + int64_t(row[q]) * p.grad_stride + c, g[q]);
          if (needs_x)
            load<T, V>(static_cast<const T*>(p.saved_input) + (n0 + q) * p.kept_stride + c, x[q]);
        }
      }
      if (needs_weights) {
#pragma unroll
        for (int q = 0; q < kRows; ++q) {
          float coefficient[kRanks];
          load_ranks(small + at_row[q] + padded + pass * kRanks, mine[q], coefficient);
#pragma unroll
          for (int k = 0; k < kRanks; ++k)
#pragma unroll
            for (int v = 0; v < V; ++v) acc_b[k][v] = fmaf(coefficient[k], g[q][v], acc_b[k][v]);
          if (first) {
            load_ranks(small + at_row[q] + pass * kRanks, mine[q], coefficient);
#pragma unroll
            for (int k = 0; k < kRanks; ++k)
#pragma unroll
              for (int v = 0; v < V; ++v) acc_a[k][v] = fmaf(coefficient[k], x[q][v], acc_a[k][v]);
          }
          if (SECOND) {
            load_ranks(small + at_row[q] + 2 * padded + pass * kRanks, mine[q], coefficient);
#pragma unroll
            for (int k = 0; k < kRanks; ++k)
#pragma unroll
              for (int v = 0; v < V; ++v) acc_b[k][v] = fmaf(-coefficient[k], x[q][v], acc_b[k][v]);
          }
        }
      }
      if constexpr (RING) __syncwarp();  // all lanes have read the buffers
      if (p.out == nullptr || pass != passes - 1) continue;
      // In the last pass g may be overwritten
      float change[kRows][V] = {};
#pragma unroll 1
      for (int i = 0; i < (first || SECOND ? padded : 0); i += 4) {
#pragma unroll
        for (int q = 0; q < kRows; ++q) {
          float dz[4], ddelta[4];
          load<float, 4>(small + at_row[q] + i, dz);
          if (SECOND) load<float, 4>(small + at_row[q] + 2 * padded + i, ddelta);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int at = (i + k) * kColumns + lane * V;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              change[q][v] = fmaf(dz[k], tile_a[at + v], change[q][v]);
              if (SECOND) change[q][v] = fmaf(-ddelta[k], tile_b[at + v], change[q][v]);
            }
          }
        }
      }
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
#pragma unroll
        for (int v = 0; v < V; ++v) change[q][v] += g[q][v];
        if constexpr (RING)
          store<T, V>(ring.of_g(step) + q * kColumns + lane * V, change[q]);
        else if (mine[q] && inside)
          store<T, V>(static_cast<T*>(p.out) + int64_t(row[q]) * p.out_stride + c, change[q]);
      }
      if constexpr (RING) {
        constexpr int kPiece = Ring<T, V>::kPiece;
        __syncwarp();
#pragma unroll
        for (int e = 0; e < Ring<T, V>::kPieces; e += kWarp) {
          const int at = (e + lane) % Ring<T, V>::kPieces * kPiece;
          const int32_t to = row_of(row, at / kColumns);
          const int64_t column = first_column + at % kColumns;
          if (to < 0 || column >= d || e + lane >= Ring<T, V>::kPieces) continue;
          store_pack<T, kPiece>(static_cast<T*>(p.out) + int64_t(to) * p.out_stride + column,
                                load_pack<T, kPiece>(ring.of_g(step) + at));
        }
        __syncwarp();  // the next copies overwrite the buffer
      }
    }
    if constexpr (RING) {
      wait_copies<0>();
      __syncwarp();  // the sums overwrite the buffers
    }
    if (!needs_weights) continue;
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
      store<float, V>(sums_a + warp * kTile + k * kColumns + lane * V, acc_a[k]);
      store<float, V>(sums_b + warp * kTile + k * kColumns + lane * V, acc_b[k]);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < kTile; e += kThreads) {
      const int i = pass * kRanks + e / kColumns;
      const int64_t column = first_column + e % kColumns;
      if (i >= r || column >= d) continue;
      const int64_t at = (int64_t(set) * r + i) * d + column;
      const float a = sum_warps<V>(sums_a, e), b = sum_warps<V>(sums_b, e);
      p.grad_write[at] = fold ? b - a : b;
      if (p.grad_read != nullptr) p.grad_read[at] = a;
    }
    __syncthreads();  // the next pass overwrites the sums
  }
}

constexpr size_t kSharedLimit = 99 * 1024;  // shared memory per block on every GPU from sm_80

// Shared memory of a block. `tiles` is the number of staged rows of weights.
constexpr size_t shared_bytes(int columns_a_thread, int tiles) {
  return sizeof(float) * kWarp * columns_a_thread * (2 * kWarps * kRanks + tiles);
}
static_assert(shared_bytes(1, 2 * kMaxRank) <= kSharedLimit);

int staged_rows(const EditGradient& p) {
  return p.out == nullptr
             ? 0
             : padded_rank(p.selection.rank) * (p.subtract_projection && !p.linear ? 2 : 1);
}

template <class T, int V, bool SECOND, bool RING>
cudaError_t launch(const EditGradient& p, cudaStream_t stream) {
  const bool needs_weights = p.grad_write != nullptr;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(ceil_div(p.selection.d, kWarp * V) + (needs_weights ? 1 : 0)),
                        unsigned(p.selection.sets));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes(V, staged_rows(p));
  config.stream = stream;
  auto kernel = edit_gradient_kernel<T, V, SECOND, RING>;
  if (config.dynamicSmemBytes > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             int(config.dynamicSmemBytes));
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class T, bool SECOND>
cudaError_t choose(const EditGradient& p, cudaStream_t stream) {
  constexpr int kPiece = 16 / sizeof(T);
  const bool pieces = p.selection.d % kPiece == 0 && p.grad_stride % kPiece == 0 &&
                      p.out_stride % kPiece == 0 && p.kept_stride % kPiece == 0 &&
                      aligned(p.grad, 16) && aligned(p.out, 16) && aligned(p.saved_input, 16);
  if (!pieces) return launch<T, 1, SECOND, false>(p, stream);
  // Two columns per thread if blocks of 64 columns still occupy all multiprocessors. Not tuned on a
  // GPU yet. With a second product they would cause register spills.
  if constexpr (!SECOND) {
    if (p.selection.d >= 8192 && shared_bytes(2, staged_rows(p)) <= kSharedLimit)
      return launch<T, 2, SECOND, true>(p, stream);
  }
  return launch<T, 1, SECOND, true>(p, stream);
}

template <class T>
cudaError_t choose(const EditGradient& p, cudaStream_t stream) {
  return p.subtract_projection && !p.linear ? choose<T, true>(p, stream)
                                            : choose<T, false>(p, stream);
}

}  // namespace

cudaError_t edit_gradient(const EditGradient& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return choose<float>(p, stream);
    case Dtype::kBFloat16:
      return choose<__nv_bfloat16>(p, stream);
    default:
      return choose<__half>(p, stream);
  }
}

}  // namespace reft_cuda
