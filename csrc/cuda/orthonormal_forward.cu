// Forward pass of the orthonormal maps (reft_kernels/orthonormal.py): R and D = W - R for all
// layers in one launch.
#include "orthonormal.cuh"

namespace reft_cuda {
namespace {

// r x r matrices of a block. Those after kMapM are used only with a base point.
enum Matrix : int { kGramPart, kCrossPart, kInner, kMapM, kCross, kMapZ, kMapY, kMatrices };
constexpr int kPartials = 2;
static_assert(build_shared_bytes(kSharedRank, kMatrices) <= kSharedLimit);

__global__ void __launch_bounds__(kBuildThreads, 1)
    build_forward_kernel(const BuildForward p, int splits, int chunk, double* scratch) {
  const Build b = make_build(p.d, p.rank, splits, chunk, kMatrices, kPartials, scratch);
  const int r = b.r, stride = b.stride;
  const bool cayley = p.cayley, has_base = p.base != nullptr;
  const int64_t layer = blockIdx.x / splits, tall = layer * p.d * r;
  const float* X = p.X + tall;
  const float* base = has_base ? p.base + tall : nullptr;
  const float* signs = p.signs != nullptr ? p.signs + layer * r : nullptr;
  const LowerPart L{X, cayley}, L0{base, false};
  double *inner = b.matrix(kInner), *M = b.matrix(kMapM), *cross = b.matrix(kCross),
         *Z = b.matrix(kMapZ), *Y = b.matrix(kMapY);
  const auto lower = [r](const float* A, int i, int j) {
    return i > j ? double(A[i * r + j]) : 0.0;
  };

  gram(b, L, L, b.partials + kGramPart * matrix_size(r));
  if (has_base) gram(b, L0, L, b.partials + kCrossPart * matrix_size(r));
  sync_layer(b);

  // The matrix to invert; with a base also V0^T V
  each_entry(r, [&](int i, int j) {
    double G = sum_partials(b, kGramPart, i, j) + (i == j ? 1.0 : 0.0);
    if (cayley)
      G += lower(X, i, j) - lower(X, j, i);
    else
      G = i < j ? G + lower(X, j, i) : (i == j ? 0.5 * G : 0.0);
    inner[i * stride + j] = G;
    if (has_base) {
      double C = sum_partials(b, kCrossPart, i, j);
      if (!cayley) C += (i == j ? 1.0 : 0.0) + lower(X, i, j) + lower(base, j, i);
      cross[i * stride + j] = C;
    }
  });
  __syncthreads();
  invert(b, inner);

  // M of F = L M + E P; for householder it is T V[:r]^T
  if (cayley)
    each_entry(r, [&](int i, int j) { M[i * stride + j] = -2.0 * inner[i * stride + j]; });
  else
    product(
        r, [&](int i, int k) { return inner[i * stride + k]; },
        [&](int k, int j) { return lower(X, j, k); },
        [&](int i, int j, double sum) { M[i * stride + j] = inner[i * stride + j] + sum; });
  __syncthreads();
  if (has_base) {  // Z = V0^T (F - E), Y = T0 Z
    product(
        r,
        [&](int i, int k) {
          return cross[i * stride + k] - (cayley ? lower(base, k, i) + (i == k ? 1.0 : 0.0) : 0.0);
        },
        [&](int k, int j) { return M[k * stride + j]; },
        [&](int i, int j, double sum) {
          Z[i * stride + j] = sum - 2.0 * ((i == j ? 1.0 : 0.0) + lower(base, j, i));
        });
    __syncthreads();
    product(
        r, [&](int i, int k) { return i <= k ? double(base[i * r + k]) : 0.0; },
        [&](int k, int j) { return Z[k * stride + j]; },
        [&](int i, int j, double sum) { Y[i * stride + j] = sum; });
    __syncthreads();
  }
  if (b.split == 0) {
    float* aux = p.aux + layer * (has_base ? 2 : 1) * r * r;
    each_entry(r, [&](int i, int j) {
      aux[i * r + j] = float(inner[i * stride + j]);
      if (has_base) aux[(r + i) * r + j] = float(cross[i * stride + j]);
    });
  }

  // R = (L M + E P - L0 Y)^T, its columns multiplied by the signs
  const bool negate = !has_base && !cayley;
  const float* point = has_base ? p.point + tall : nullptr;
  const float* W = p.W != nullptr ? p.W + tall : nullptr;
  float* R = p.R + tall;
  float* D = p.W != nullptr ? p.D + tall : nullptr;
  const Tiling tiling(r);
  const Patch patch(tiling, true);
  for (int j0 = 0; j0 < r; j0 += tiling.size)
    for (int row0 = b.first; row0 < b.last; row0 += tiling.rows) {
      float acc[4][4] = {};
      multiply_square(
          b, tiling, patch, row0, j0, L,
          [&](int k, int j) { return M[k * stride + j] * column_sign(signs, j, negate); }, acc);
      if (has_base)
        multiply_square(
            b, tiling, patch, row0, j0, L0,
            [&](int k, int j) { return -Y[k * stride + j] * column_sign(signs, j, negate); }, acc);
#pragma unroll
      for (int jj = 0; jj < 4; ++jj)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int j = j0 + patch.j + jj, c = row0 + patch.c + q * patch.step;
          if (j >= r || c >= b.last) continue;
          float value = acc[jj][q];
          if (c < r) {
            const double m = M[c * stride + j], unit = c == j ? 1.0 : 0.0;
            double P = cayley ? -m - unit : m - unit;
            if (has_base) P -= unit + Y[c * stride + j];
            value += float(P * column_sign(signs, j, negate));
          }
          const int64_t at = int64_t(j) * p.d + c;
          if (has_base) value += point[at];
          R[at] = value;
          if (D != nullptr) D[at] = W[at] - value;
        }
    }
  leave_layer(b);
}

}  // namespace

cudaError_t build_forward_plan(int layers, int d, int rank, BuildPlan* plan) {
  return make_plan(build_forward_kernel, layers, d, rank, kMatrices, kPartials, plan);
}

cudaError_t build_forward(const BuildForward& p, const BuildPlan& plan, void* scratch,
                          cudaStream_t stream) {
  return launch_build(build_forward_kernel, p, plan, kMatrices, scratch, stream);
}

}  // namespace reft_cuda
