// What the edit's kernels for tiles of 16 rows share: the product of the rows with the weights of a
// warp's columns, on the tensor cores, and its sum over a cluster. They serve half precision and
// one set of weights.
//
// A cluster of blocks divides the columns, and a warp owns 128 of them. It keeps its columns of the
// weights in registers, as sums of two half-precision terms in the layout of the tensor cores, for
// all tiles that the cluster processes. The warps of a block add their parts of a product in shared
// memory and send the sum to each block of the cluster, which adds those of all blocks, both in a
// fixed order. Blocks wait for these transfers, and not at a barrier of the cluster, which would
// also wait for the loads and stores of the rows.
//
// In 32 consecutive columns, a lane loads the eight that start at 8 * (lane % 4), for the rows
// lane / 4 and lane / 4 + 8 of the tile. The products use the columns in the order in which these
// 16 bytes are the lane's operands of m16n8k16 and its results.
#pragma once

#include "common.cuh"

namespace reft_cuda {


constexpr int kTileRows = 16;
constexpr int kWarpColumns = 128, kGroup = 32, kGroups = kWarpColumns / kGroup;
constexpr int kTileWarps = 8;  // at most, in a block
constexpr int kMaxBlocks = 8;  // in a cluster, the portable maximum
constexpr int kRanks = 8;      // of a tile of z
constexpr int kTile = kTileRows * kRanks;

// The lane's part of a tile of rows.
struct RowTile {
  int32_t row[2];       // row numbers, or -1
  uint4 x[2][kGroups];  // eight elements of each row and group
};

template <class T>
__device__ inline void unpair(uint32_t both, float& low, float& high) {
  const uint16_t bits[2] = {uint16_t(both), uint16_t(both >> 16)};
  T value[2];
  memcpy(value, bits, sizeof value);
  low = to_float(value[0]);
  high = to_float(value[1]);
}

// Two values as the sum of two half-precision terms each.
template <class T>
__device__ inline void split(float low, float high, uint32_t& leading, uint32_t& rest) {
  float first, second;
  leading = round_pair<T>(low, high);
  unpair<T>(leading, first, second);
  rest = round_pair<T>(low - first, high - second);
}

__device__ inline uint32_t word(const uint4& of, int at) {
  return at == 0 ? of.x : at == 1 ? of.y : at == 2 ? of.z : of.w;
}

// READS and WRITES are the numbers of 8 ranks of the two products. If B x needs a product of its
// own, B follows A in the first one.
// V consecutive elements of a row of from - minus, either of which may be null, or zeros.
template <class W, int V>
__device__ inline void load_difference(const W* from, const W* minus, bool inside, int64_t at,
                                       float (&value)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) value[v] = 0.0f;
  if (inside && from != nullptr) load<W, V>(from + at, value);
  if (inside && minus != nullptr) {
    float subtracted[V];
    load<W, V>(minus + at, subtracted);
#pragma unroll
    for (int v = 0; v < V; ++v) value[v] -= subtracted[v];
  }
}

// The lane's eight columns of row i of from - minus, in 32 consecutive columns. In fp32 two lanes
// load 32 consecutive bytes at a time, and exchange what the other one uses.
template <class W>
__device__ inline void load_eight(const W* from, const W* minus, int i, int rank, int d,
                                  int group_column, float (&value)[8]) {
  const int lane = threadIdx.x % kWarp, odd = lane % 2;
  const int64_t row = int64_t(i) * d;
  if constexpr (sizeof(W) == 4) {
    const int c = group_column + lane % 4 / 2 * 16;  // of the even lane
    float lower[4], upper[4];  // of the columns of the even lane and of the odd one
    load_difference<W, 4>(from, minus, i < rank && c < d, row + c + odd * 4, lower);
    load_difference<W, 4>(from, minus, i < rank && c + 8 < d, row + c + 8 + odd * 4, upper);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float other = __shfl_xor_sync(0xffffffffu, odd ? lower[v] : upper[v], 1);
      value[v] = odd ? other : lower[v];
      value[4 + v] = odd ? upper[v] : other;
    }
  } else {
    const int c = group_column + lane % 4 * 8;
    load_difference<W, 8>(from, minus, i < rank && c < d, row + c, value);
  }
}

// The even or the odd ones of eight columns of a row, as lane / 4 is. In fp32 the lanes of both
// load a half each, and exchange what the other one uses.
template <class W>
__device__ inline void load_alternate(const W* from, bool inside, int64_t at, float (&value)[4]) {
  const int odd = threadIdx.x / 4 % 2;
  if constexpr (sizeof(W) == 4) {
    float half[4];
    load_difference<W, 4>(from, nullptr, inside, at + odd * 4, half);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const float own = odd ? half[2 * v + 1] : half[2 * v];
      const float other =
          __shfl_xor_sync(0xffffffffu, odd ? half[2 * v] : half[2 * v + 1], 4);
      value[v] = odd ? other : own;
      value[2 + v] = odd ? own : other;
    }
  } else {
    float whole[8];
    load_difference<W, 8>(from, nullptr, inside, at, whole);
#pragma unroll
    for (int v = 0; v < 4; ++v) value[v] = odd ? whole[2 * v + 1] : whole[2 * v];
  }
}

// A [8 * TILES, columns of a warp] as the second operand of m16n8k16, in two terms of type T.
template <class T, int TILES>
struct ReadWeights {
  uint32_t value[TILES][2 * kGroups][2], rest[TILES][2 * kGroups][2];

  // Loads ranks first_rank to first_rank + 7 of from - minus [rank, d], each of which may be null.
  template <class W>
  __device__ inline void load(const W* from, const W* minus, int tile, int first_rank, int rank,
                              int d, int first_column) {
    const int i = first_rank + threadIdx.x % kWarp / 4;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      float eight[8];
      load_eight<W>(from, minus, i, rank, d, first_column + j * kGroup, eight);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        split<T>(eight[2 * k], eight[2 * k + 1], value[tile][2 * j + k / 2][k % 2],
                 rest[tile][2 * j + k / 2][k % 2]);
    }
  }

  // Returns the product of a tile of rows with the weights. The small terms have sums of their own
  // with SEPARATE, which shortens the chain of sums and takes registers.
  template <bool SEPARATE>
  __device__ inline void multiply(const RowTile& x, float (&z)[TILES][4]) const {
    float small[TILES][4] = {};
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int k = 0; k < 4; ++k) z[t][k] = 0.0f;
#pragma unroll
    for (int step = 0; step < 2 * kGroups; ++step) {
      const uint32_t a[4] = {
          word(x.x[0][step / 2], step % 2 * 2), word(x.x[1][step / 2], step % 2 * 2),
          word(x.x[0][step / 2], step % 2 * 2 + 1), word(x.x[1][step / 2], step % 2 * 2 + 1)};
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        multiply_add<T>(SEPARATE ? small[t] : z[t], a, rest[t][step]);
        multiply_add<T>(z[t], a, value[t][step]);
      }
    }
    if constexpr (SEPARATE) {
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int k = 0; k < 4; ++k) z[t][k] += small[t][k];
    }
  }
};

__device__ inline void load_row_numbers(const Selection& selection, int tile,
                                        int32_t (&row)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int n = tile * kTileRows + half * 8 + threadIdx.x % kWarp / 4;
    row[half] = -1;
    if (n < selection.num_rows)
      row[half] = selection.rows != nullptr ? selection.rows[n] : n;
  }
}

// Starts the loads of a tile.
template <class T>
__device__ inline void load_tile(const T* source, int64_t stride, int d, const int32_t (&row)[2],
                                 int first_column, RowTile& to) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    to.row[half] = row[half];
    const T* from = source + row[half] * stride;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int c = first_column + j * kGroup + lane % 4 * 8;
      to.x[half][j] = {0, 0, 0, 0};
      if (row[half] >= 0 && c < d) to.x[half][j] = *reinterpret_cast<const uint4*>(from + c);
    }
  }
}

// A tile [16, 8] in shared memory is in the order of the lanes.
__device__ inline void put(float* tile, const float (&value)[4]) {
  reinterpret_cast<float4*>(tile)[threadIdx.x % kWarp] = {value[0], value[1], value[2], value[3]};
}

// Adds tiles[count, READS] in order.
template <int READS>
__device__ inline void sum_tiles(const float* tiles, int count, float (&sum)[READS][4]) {
  const float4* from = reinterpret_cast<const float4*>(tiles) + threadIdx.x % kWarp;
#pragma unroll
  for (int t = 0; t < READS; ++t) {
    const float4 value = from[t * kWarp];
    sum[t][0] = value.x;
    sum[t][1] = value.y;
    sum[t][2] = value.z;
    sum[t][3] = value.w;
  }
#pragma unroll 4
  for (int k = 1; k < count; ++k)
#pragma unroll
    for (int t = 0; t < READS; ++t) {
      const float4 value = from[(k * READS + t) * kWarp];
      sum[t][0] += value.x;
      sum[t][1] += value.y;
      sum[t][2] += value.z;
      sum[t][3] += value.w;
    }
}

// The sums of products over the warps of a cluster, in shared memory. Alternate tiles use alternate
// halves of it. BEFORE is a multiple of four.
template <int TILES, int BEFORE>
struct ClusterSum {
  int blocks, block;
  unsigned count;  // tiles so far

  static constexpr size_t bytes(int blocks, int warps) {
    return 2 * sizeof(uint64_t) +
           sizeof(float) * (BEFORE + 2 * TILES * kTile * (warps + blocks));
  }

  // All threads of the cluster must construct it.
  __device__ inline ClusterSum(int of_blocks, int of_block)
      : blocks(of_blocks), block(of_block), count(0) {
    if (blocks == 1) return;
    if (threadIdx.x < 2) start_transfers(arrived() + threadIdx.x);
    sync_cluster();  // the other blocks' shared memory exists
  }

  // [2], then BEFORE values of the kernel, then the sums of warps [2, warps, TILES, lane, 4] and of
  // blocks [2, blocks, TILES, lane, 4]
  __device__ static inline uint64_t* arrived() { return dynamic_shared<uint64_t>(); }
  __device__ static inline float* values() { return dynamic_shared<float>() + 4; }
  __device__ static inline float* sums() { return values() + BEFORE; }
  __device__ static inline int warps() { return blockDim.x / kWarp; }

  // Replaces z by its sum over the cluster.
  __device__ inline void add(float (&z)[TILES][4]) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const unsigned turn = count % 2;
    float* parts = sums() + turn * warps() * TILES * kTile;
#pragma unroll
    for (int t = 0; t < TILES; ++t) put(parts + (warp * TILES + t) * kTile, z[t]);
    __syncthreads();
    if (blocks == 1) {
      sum_tiles<TILES>(parts, warps(), z);
    } else {
      // Every warp sends the sum over this block's warps to one block
      float* all = sums() + (2 * warps() + turn * blocks) * TILES * kTile;
      if (threadIdx.x == 0)
        expect_transfers(arrived() + turn, unsigned(sizeof(float) * blocks * TILES * kTile));
      for (int to = warp; to < blocks; to += warps()) {
        sum_tiles<TILES>(parts, warps(), z);
#pragma unroll
        for (int t = 0; t < TILES; ++t)
          transfer(all + (block * TILES + t) * kTile + lane * 4, z[t], arrived() + turn, to);
      }
      wait_transfers(arrived() + turn, count / 2 % 2);
      sum_tiles<TILES>(all, blocks, z);
    }
    ++count;
  }
};

// ---- Host code

constexpr int64_t kMaxRows = int64_t(1) << 30;  // the kernels count rows in 32 bits

// Returns an attribute of the current device, or 0.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return known ? value : 0;
}

// Returns the fewest blocks of a cluster for d columns, or 0 if d is not served on this device.
inline int fewest_blocks(int d) {
  int blocks = 1;
  while (d > blocks * kTileWarps * kWarpColumns) blocks *= 2;
  if (blocks > kMaxBlocks) return 0;
  return blocks == 1 || device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? blocks : 0;
}

// Returns whether rows of `stride` elements are served, and one set of weights.
inline bool tiles_serve(const Selection& selection, int ranks) {
  return selection.weight_ids == nullptr && selection.rank <= ranks &&
         selection.num_rows <= kMaxRows && selection.d % 8 == 0 && fewest_blocks(selection.d) > 0;
}

// Returns how many clusters are resident at once; more would wait for the first ones to end.
template <class Kernel>
cudaError_t resident_clusters(Kernel kernel, const cudaLaunchConfig_t& config, int blocks,
                              int* clusters) {
  struct Known {
    int device, blocks, threads, clusters;
  };
  static thread_local Known known = {-1, 0, 0, 0};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const int threads = int(config.blockDim.x);
  if (known.device != device || known.blocks != blocks || known.threads != threads) {
    int count = 0;
    if (blocks > 1) {
      error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    } else {
      int processors = 0;
      error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
      if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads,
                                                              config.dynamicSmemBytes);
      count *= processors;
    }
    if (error != cudaSuccess) return error;
    if (count < 1) return cudaErrorLaunchOutOfResources;
    known = {device, blocks, threads, count};
  }
  *clusters = known.clusters;
  return cudaSuccess;
}

// Launches a kernel with arguments (p, more..., blocks of a cluster). Few tiles are divided among
// more blocks, as long as all of them are resident.
template <class Kernel, class Bytes, class... Arguments>
cudaError_t launch_tiles(Kernel kernel, const Selection& selection, Bytes shared_bytes,
                         cudaStream_t stream, const Arguments&... arguments) {
  const int64_t tiles = ceil_div(selection.num_rows, kTileRows);
  const int parts = int(ceil_div(selection.d, kWarpColumns));
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  int blocks = fewest_blocks(selection.d);
  while (blocks > 1 && blocks < kMaxBlocks && tiles * blocks * 2 <= processors) blocks *= 2;
  const int warps = int(ceil_div(parts, blocks));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(warps * kWarp));
  config.dynamicSmemBytes = shared_bytes(blocks, warps);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = blocks > 1 ? 1 : 0;
  int clusters = 0;
  const cudaError_t error = resident_clusters(kernel, config, blocks, &clusters);
  if (error != cudaSuccess) return error;
  config.gridDim = dim3(unsigned(blocks * (tiles < clusters ? tiles : clusters)));
  return cudaLaunchKernelEx(&config, kernel, arguments..., blocks);
}

}  // namespace reft_cuda
