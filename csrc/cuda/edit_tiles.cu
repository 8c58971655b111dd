// Forward pass of the edit of all or of selected rows that use one set of weights, in one launch
// that reads each row once:  y = x + B^T (coeff * u), u = act(A x + c) - (B x + p).
//
// A warp keeps its part of a tile of rows in registers from the load to the store, while the parts
// of the next tiles are being loaded. tiles.cuh describes the products and their sums.
#include "tiles.cuh"

namespace reft_cuda {
namespace {

// READS and WRITES are the numbers of 8 ranks of the two products. If B x needs a product of its
// own, B follows A in the first one.
template <class T, int READS, int WRITES>
struct Weights {
  static constexpr bool kSecond = READS != WRITES;
  ReadWeights<T, READS> read;
  // [step of 8 columns, ranks]; in bf16, which has the range of u
  uint32_t write[4 * kGroups][WRITES], write_rest[4 * kGroups][WRITES];

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
    load_write<W>(B, rank, d, first_column);  // first: the compiler then spills no register
#pragma unroll
    for (int tile = 0; tile < READS; ++tile)
      read.template load<W>(tile < WRITES ? A : B, fold ? B : nullptr, tile,
                            tile % WRITES * kRanks, rank, d, first_column);
  }
};

__device__ inline void activate_all(float (&z)[4], Activation activation) {
  if (activation == Activation::kLinear) return;
#pragma unroll
  for (int k = 0; k < 4; ++k) z[k] = activate(z[k], activation);
}

template <int READS, int WRITES>
using Sum = ClusterSum<READS, 2 * kRanks * WRITES>;

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

  const int tiles = int(ceil_div(selection.num_rows, kTileRows));
  RowTile x[kStages];
  const auto load_first = [&] {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      int32_t row[2];
      load_row_numbers(selection, cluster + s * clusters, row);
      load_tile<T>(static_cast<const T*>(p.source), p.source_stride, d, row, first_column, x[s]);
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
  Sum<READS, WRITES> sum(blocks, block);
  float* biases = sum.values();  // [2, 8 * WRITES]
  for (int e = threadIdx.x; e < 2 * kRanks * WRITES; e += blockDim.x) {
    const AnyDtype& bias = e < kRanks * WRITES ? p.read_bias : p.subtract_bias;
    const int i = e % (kRanks * WRITES);
    biases[e] = i < r && bias.data != nullptr ? load_any(bias, i) : 0.0f;
  }

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

      float z[READS][4];
      weights.read.template multiply<!kFull>(x[s], z);
      sum.add(z);  // its barrier also comes before the first use of the biases

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
      load_tile<T>(static_cast<const T*>(p.source), p.source_stride, d, later_row, first_column,
                   x[s]);
    }
  }
}

// ---- Host code

static_assert(Sum<2, 2>::bytes(kMaxBlocks, kTileWarps) <= 48 * 1024);

template <class T, int READS, int WRITES>
cudaError_t launch(const EditForward& p, cudaStream_t stream) {
  return launch_tiles(edit_tiles_kernel<T, READS, WRITES>, p.selection,
                      Sum<READS, WRITES>::bytes, stream, p);
}

template <class T>
cudaError_t choose(const EditForward& p, cudaStream_t stream) {
  if (p.subtract_projection && p.activation != Activation::kLinear)
    return launch<T, 2, 1>(p, stream);
  return p.selection.rank <= kRanks ? launch<T, 1, 1>(p, stream) : launch<T, 2, 2>(p, stream);
}

}  // namespace

bool edit_tiles_serves(const EditForward& p) {
  const bool second = p.subtract_projection && p.activation != Activation::kLinear;
  return p.dtype != Dtype::kFloat32 && p.source_stride % 8 == 0 && p.out_stride % 8 == 0 &&
         aligned(p.source, 16) && aligned(p.out, 16) && aligned(p.saved_input, 16) &&
         aligned(p.read, 16) && aligned(p.write, 16) &&
         tiles_serve(p.selection, second ? kRanks : 2 * kRanks);
}

cudaError_t edit_tiles(const EditForward& p, cudaStream_t stream) {
  return p.dtype == Dtype::kBFloat16 ? choose<__nv_bfloat16>(p, stream)
                                     : choose<__half>(p, stream);
}

}  // namespace reft_cuda
