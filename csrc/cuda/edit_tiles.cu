// Forward pass of the edit of all or of selected rows that use one set of weights, in one launch that reads each
// row once:  y = x + B^T (coeff * u), u = act(A x + c) - (B x + p).
//
// A cluster of blocks divides the columns, and a warp owns 128 of them. It keeps its columns of the
// weights in registers, as sums of two half-precision terms in the layout of the tensor cores, for
// all tiles of 16 rows that the cluster processes. It also keeps its part of a tile in registers
// from the load to the store, while the parts of the next tiles are being loaded. The warps of a
// block add their parts of z in shared memory and send the sum to each block of the cluster, which
// adds those of all blocks, both in a fixed order. Blocks wait for these transfers, and not at a
// barrier of the cluster, which would also wait for the loads and stores of the rows.
//
// In 32 consecutive columns, a lane loads the eight that start at 8 * (lane % 4), for the rows
// lane / 4 and lane / 4 + 8 of the tile. The products use the columns in the order in which these
// 16 bytes are the lane's operands of m16n8k16 and its results.
#include "common.cuh"

namespace reft_cuda {
namespace {

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

// The even or the odd ones of eight columns of a row, as lane / 4 is. In fp32 the lanes of both load
// a half each, and exchange what the other one uses.
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

template <class T, int READS, int WRITES>
struct Weights {
  static constexpr bool kSecond = READS != WRITES;
  // [ranks, step of 16 columns, half]; in T, because x is
  uint32_t read[READS][2 * kGroups][2], read_rest[READS][2 * kGroups][2];
  // [step of 8 columns, ranks]; in bf16, which has the range of u
  uint32_t write[4 * kGroups][WRITES], write_rest[4 * kGroups][WRITES];

  // from, minus: [rank, d], or null for zero
  template <class W>
  __device__ inline void load_read(const W* from, const W* minus, int tile, int rank, int d,
                                   int first_column) {
    const int lane = threadIdx.x % kWarp, i = tile % WRITES * kRanks + lane / 4;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      float value[8];
      load_eight<W>(from, minus, i, rank, d, first_column + j * kGroup, value);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        split<T>(value[2 * k], value[2 * k + 1], read[tile][2 * j + k / 2][k % 2],
                 read_rest[tile][2 * j + k / 2][k % 2]);
    }
  }

  template <class W>
  __device__ inline void load_write(const W* from, int rank, int d, int first_column) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int c = first_column + j * kGroup + lane / 8 * 8;  // of two lanes
#pragma unroll
      for (int tile = 0; tile < WRITES; ++tile) {
        float value[2][4];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int i = tile * kRanks + lane % 4 * 2 + k;
          load_alternate<W>(from, i < rank && c < d, int64_t(i) * d + c, value[k]);
        }
#pragma unroll
        for (int v = 0; v < 4; ++v)
          split<__nv_bfloat16>(value[0][v], value[1][v], write[4 * j + v][tile],
                               write_rest[4 * j + v][tile]);
      }
    }
  }

  template <class W>
  __device__ inline void load_all(const EditForward& p, int first_column) {
    const int rank = p.selection.rank, d = p.selection.d;
    const W *A = static_cast<const W*>(p.read), *B = static_cast<const W*>(p.write);
    const bool fold = p.subtract_projection && !kSecond;
#pragma unroll
    for (int tile = 0; tile < READS; ++tile)
      load_read<W>(tile < WRITES ? A : B, fold ? B : nullptr, tile, rank, d, first_column);
    load_write<W>(B, rank, d, first_column);
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
__device__ inline void load_tile(const EditForward& p, const int32_t (&row)[2], int first_column,
                                 RowTile& to) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    to.row[half] = row[half];
    const T* from = static_cast<const T*>(p.source) + row[half] * p.source_stride;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int c = first_column + j * kGroup + lane % 4 * 8;
      to.x[half][j] = {0, 0, 0, 0};
      if (row[half] >= 0 && c < p.selection.d)
        to.x[half][j] = *reinterpret_cast<const uint4*>(from + c);
    }
  }
}

__device__ inline void activate_all(float (&z)[4], Activation activation) {
  if (activation == Activation::kLinear) return;
#pragma unroll
  for (int k = 0; k < 4; ++k) z[k] = activate(z[k], activation);
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

template <class T, int READS, int WRITES>
__global__ void __launch_bounds__(kTileWarps* kWarp, 1)
    edit_tiles_kernel(const EditForward p, int blocks) {
  constexpr bool kSecond = READS != WRITES;
  constexpr int kStages = READS + WRITES == 2 ? 3 : 2;  // as many as the registers hold
  const Selection& selection = p.selection;
  const int r = selection.rank, d = selection.d, warps = blockDim.x / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int block = blockIdx.x % blocks;
  const int cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  const int first_column = (block * warps + warp) * kWarpColumns;
  auto* arrived = dynamic_shared<uint64_t>();           // [2]
  float* biases = reinterpret_cast<float*>(arrived + 2);  // [2, 8 * WRITES]
  float* part = biases + 2 * kRanks * WRITES;             // [2, warps, READS, lane, 4]
  float* shared_z = part + 2 * warps * READS * kTile;     // [2, blocks, READS, lane, 4]

  const int tiles = int(ceil_div(selection.num_rows, kTileRows));
  RowTile x[kStages];
  const auto load_first = [&] {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      int32_t row[2];
      load_row_numbers(selection, cluster + s * clusters, row);
      load_tile<T>(p, row, first_column, x[s]);
    }
  };
  constexpr bool kFull = READS + WRITES == 4;  // almost all registers hold weights
  if (!kFull) load_first();
  Weights<T, READS, WRITES> weights;
  if (p.weight_dtype == Dtype::kFloat32)
    weights.template load_all<float>(p, first_column);
  else
    weights.template load_all<T>(p, first_column);
  if (kFull) load_first();
  for (int e = threadIdx.x; e < 2 * kRanks * WRITES; e += blockDim.x) {
    const AnyDtype& bias = e < kRanks * WRITES ? p.read_bias : p.subtract_bias;
    const int i = e % (kRanks * WRITES);
    biases[e] = i < r && bias.data != nullptr ? load_any(bias, i) : 0.0f;
  }
  if (blocks > 1) {
    if (threadIdx.x < 2) start_transfers(arrived + threadIdx.x);
    sync_cluster();  // the other blocks' shared memory exists
  }

  unsigned count = 0;  // of tiles so far; alternate tiles use alternate halves of shared memory
  for (int next = cluster; next < tiles;) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      const int tile = next;
      if (tile >= tiles) break;
      next += clusters;
      int32_t later_row[2];
      const int later = tile + kStages * clusters;
      if (!kFull) load_row_numbers(selection, later, later_row);  // before they are needed
      float coeff[WRITES][4];
      const auto load_coeff = [&] {
#pragma unroll
        for (int w = 0; w < WRITES; ++w)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int i = w * kRanks + lane % 4 * 2 + k % 2;
            const int n = tile * kTileRows + k / 2 * 8 + lane / 4;
            const bool given = p.coeff.data != nullptr && i < r && x[s].row[k / 2] >= 0;
            coeff[w][k] = given ? load_any(p.coeff, int64_t(n) * r + i) : 1.0f;
          }
      };
      if (!kFull) load_coeff();

      // z of this warp's columns
      float z[READS][4] = {}, rest[READS][4] = {};
#pragma unroll
      for (int step = 0; step < 2 * kGroups; ++step) {
        const uint32_t a[4] = {
            word(x[s].x[0][step / 2], step % 2 * 2), word(x[s].x[1][step / 2], step % 2 * 2),
            word(x[s].x[0][step / 2], step % 2 * 2 + 1),
            word(x[s].x[1][step / 2], step % 2 * 2 + 1)};
#pragma unroll
        for (int t = 0; t < READS; ++t) {
          multiply_add<T>(kFull ? z[t] : rest[t], a, weights.read_rest[t][step]);
          multiply_add<T>(z[t], a, weights.read[t][step]);
        }
      }
      const unsigned turn = count % 2;
      float* parts = part + turn * warps * READS * kTile;
#pragma unroll
      for (int t = 0; t < READS; ++t) {
#pragma unroll
        for (int k = 0; k < 4; ++k) z[t][k] += rest[t][k];
        put(parts + (warp * READS + t) * kTile, z[t]);
      }
      __syncthreads();
      if (blocks == 1) {
        sum_tiles<READS>(parts, warps, z);
      } else {
        // Every warp sends the sum over this block's warps to one block
        float* all = shared_z + turn * blocks * READS * kTile;
        if (threadIdx.x == 0)
          expect_transfers(arrived + turn, unsigned(sizeof(float) * blocks * READS * kTile));
        for (int to = warp; to < blocks; to += warps) {
          sum_tiles<READS>(parts, warps, z);
#pragma unroll
          for (int t = 0; t < READS; ++t)
            transfer(all + (block * READS + t) * kTile + lane * 4, z[t], arrived + turn, to);
        }
        wait_transfers(arrived + turn, count / 2 % 2);
        sum_tiles<READS>(all, blocks, z);
      }
      ++count;

      const auto bias_of = [&](int which, int w, int k) {
        return biases[(which * WRITES + w) * kRanks + lane % 4 * 2 + k % 2];
      };
      if (kFull) load_coeff();
      uint32_t used[WRITES][2], used_rest[WRITES][2];  // coeff * u of the two rows
#pragma unroll
      for (int w = 0; w < WRITES; ++w) {
        float value[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) value[k] = z[w][k] += bias_of(0, w, k);
        activate_all(value, p.activation);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (kSecond) value[k] -= z[READS - WRITES + w][k];
          value[k] -= bias_of(1, w, k);
        }
        if (p.u != nullptr && block == 0 && warp == 0) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int i = w * kRanks + lane % 4 * 2 + k % 2;
            const int n = tile * kTileRows + k / 2 * 8 + lane / 4;
            if (i >= r || n >= selection.num_rows) continue;
            const bool selected = x[s].row[k / 2] >= 0;  // others add nothing to the gradients
            p.u[int64_t(n) * r + i] = selected ? value[k] : 0.0f;
            if (p.z != nullptr) p.z[int64_t(n) * r + i] = selected ? z[w][k] : 0.0f;
          }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k)
          value[k] = w * kRanks + lane % 4 * 2 + k % 2 < r ? value[k] * coeff[w][k] : 0.0f;
        split<__nv_bfloat16>(value[0], value[1], used[w][0], used_rest[w][0]);
        split<__nv_bfloat16>(value[2], value[3], used[w][1], used_rest[w][1]);
      }

      // y, in the registers of x
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        uint32_t y[2][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int step = j * 4 + k;
          float sum[4];
          unpair<T>(word(x[s].x[0][j], k), sum[0], sum[1]);
          unpair<T>(word(x[s].x[1][j], k), sum[2], sum[3]);
          if constexpr (WRITES == 1) {
            const uint32_t both[4] = {used[0][0], used[0][1], used_rest[0][0], used_rest[0][1]};
            const uint32_t twice[2] = {weights.write[step][0], weights.write[step][0]};
            multiply_add_half(sum, used[0], weights.write_rest[step]);
            multiply_add<__nv_bfloat16>(sum, both, twice);
          } else {
            const uint32_t first[4] = {used[0][0], used[0][1], used[1][0], used[1][1]};
            const uint32_t second[4] = {used_rest[0][0], used_rest[0][1], used_rest[1][0],
                                        used_rest[1][1]};
            multiply_add<__nv_bfloat16>(sum, first, weights.write_rest[step]);
            multiply_add<__nv_bfloat16>(sum, second, weights.write[step]);
            multiply_add<__nv_bfloat16>(sum, first, weights.write[step]);
          }
          y[0][k] = round_pair<T>(sum[0], sum[1]);
          y[1][k] = round_pair<T>(sum[2], sum[3]);
        }
        const int c = first_column + j * kGroup + lane % 4 * 8;
        if (c >= d) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int n = tile * kTileRows + half * 8 + lane / 4;
          const int64_t row = x[s].row[half];
          if (p.saved_input != nullptr && n < selection.num_rows)
            store_global(
                reinterpret_cast<uint4*>(static_cast<T*>(p.saved_input) + int64_t(n) * d + c),
                x[s].x[half][j]);  // zeros if the entry is skipped
          if (row >= 0)
            store_global(
                reinterpret_cast<uint4*>(static_cast<T*>(p.out) + row * p.out_stride + c),
                uint4{y[half][0], y[half][1], y[half][2], y[half][3]});
        }
      }
      if (kFull) load_row_numbers(selection, later, later_row);
      load_tile<T>(p, later_row, first_column, x[s]);
    }
  }
}

// ---- Host code

constexpr int64_t kMaxRows = int64_t(1) << 30;  // the kernel counts rows in 32 bits

struct TilePlan {
  int blocks, warps;  // of a cluster, of a block; blocks is 0 if the shape is not supported
};

// Few tiles are divided among more blocks, as long as all blocks are resident.
TilePlan tile_plan(int d, int64_t tiles, int processors) {
  const int parts = int(ceil_div(d, kWarpColumns));
  int blocks = 1;
  while (parts > blocks * kTileWarps) blocks *= 2;
  if (blocks > kMaxBlocks) return {0, 0};
  while (blocks > 1 && blocks < kMaxBlocks && tiles * blocks * 2 <= processors) blocks *= 2;
  return {blocks, int(ceil_div(parts, blocks))};
}

constexpr size_t tile_shared_bytes(int reads, int writes, int blocks, int warps) {
  return 2 * sizeof(uint64_t) +
         sizeof(float) * (2 * kRanks * writes + 2 * reads * kTile * (warps + blocks));
}
static_assert(tile_shared_bytes(2, 2, kMaxBlocks, kTileWarps) <= 48 * 1024);

// Returns an attribute of the current device, or 0.
int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return known ? value : 0;
}

bool has_clusters() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

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

template <class T, int READS, int WRITES>
cudaError_t launch(const EditForward& p, cudaStream_t stream) {
  const auto kernel = edit_tiles_kernel<T, READS, WRITES>;
  const int64_t tiles = ceil_div(p.selection.num_rows, kTileRows);
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const TilePlan plan = tile_plan(p.selection.d, tiles, processors);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(plan.blocks));
  config.blockDim = dim3(unsigned(plan.warps * kWarp));
  config.dynamicSmemBytes = tile_shared_bytes(READS, WRITES, plan.blocks, plan.warps);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(plan.blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = plan.blocks > 1 ? 1 : 0;
  int clusters = 0;
  const cudaError_t error = resident_clusters(kernel, config, plan.blocks, &clusters);
  if (error != cudaSuccess) return error;
  config.gridDim = dim3(unsigned(plan.blocks * (tiles < clusters ? tiles : clusters)));
  return cudaLaunchKernelEx(&config, kernel, p, plan.blocks);
}

template <class T>
cudaError_t choose(const EditForward& p, cudaStream_t stream) {
  if (p.subtract_projection && p.activation != Activation::kLinear)
    return launch<T, 2, 1>(p, stream);
  return p.selection.rank <= kRanks ? launch<T, 1, 1>(p, stream) : launch<T, 2, 2>(p, stream);
}

}  // namespace

bool edit_tiles_serves(const EditForward& p) {
  const Selection& selection = p.selection;
  const bool second = p.subtract_projection && p.activation != Activation::kLinear;
  if (selection.weight_ids != nullptr || p.dtype == Dtype::kFloat32) return false;
  if (selection.rank > (second ? kRanks : 2 * kRanks) || selection.num_rows > kMaxRows)
    return false;
  const bool vectors = selection.d % 8 == 0 && p.source_stride % 8 == 0 &&
                       p.out_stride % 8 == 0 && aligned(p.source, 16) && aligned(p.out, 16) &&
                       aligned(p.saved_input, 16) && aligned(p.read, 16) && aligned(p.write, 16);
  const int blocks = tile_plan(selection.d, 0, 0).blocks;
  return vectors && blocks > 0 && (blocks == 1 || has_clusters());
}

cudaError_t edit_tiles(const EditForward& p, cudaStream_t stream) {
  return p.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(p, stream)
                                     : choose<__half>(p, stream);
}

}  // namespace reft_cuda
