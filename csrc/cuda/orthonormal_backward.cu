// Backward pass of the orthonormal maps (reft_kernels/orthonormal.py) for all layers in one launch.
#include "orthonormal.cuh"

namespace reft_cuda {
namespace {

// r x r matrices of a block: two with partial sums, and others, which reuse the memory of matrices
// that are no longer needed.
enum Matrix : int {
  kMBarPart,
  kCrossBarPart,
  kMBar,
  kMapM,
  kCrossBar,
  kH,
  kJ,
  kMatrices,
  kU = kCrossBar,
  kSBar = kH
};
constexpr int kPartials = 2;
static_assert(build_shared_bytes(kSharedRank, kMatrices) <= kSharedLimit);

__global__ void __launch_bounds__(kBuildThreads, 1)
    build_backward_kernel(const BuildBackward p, int splits, int chunk, double* scratch) {
  const Build b = make_build(p.d, p.rank, splits, chunk, kMatrices, kPartials, scratch);
  const int r = b.r, stride = b.stride;
  const bool cayley = p.cayley, has_base = p.base != nullptr;
  const int64_t layer = blockIdx.x / splits, tall = layer * p.d * r;
  const float* X = p.X + tall;
  const float* base = has_base ? p.base + tall : nullptr;
  const float* signs = p.signs != nullptr ? p.signs + layer * r : nullptr;
  const float* inner = p.aux + layer * (has_base ? 2 : 1) * r * r;
  const float* cross = inner + r * r;  // with a base
  const LowerPart L{X, cayley}, L0{base, false};
  const TotalGradient F_bar{p.grad_R != nullptr ? p.grad_R + tall : nullptr,
                            p.grad_D != nullptr ? p.grad_D + tall : nullptr};
  double *M_bar = b.matrix(kMBar), *M = b.matrix(kMapM), *U = b.matrix(kU),
         *S_bar = b.matrix(kSBar);
  double *cross_bar = b.matrix(kCrossBar), *H = b.matrix(kH), *J = b.matrix(kJ);
  const auto lower = [r](const float* A, int i, int j) {
    return i > j ? double(A[i * r + j]) : 0.0;
  };
  const bool negate = !has_base && !cayley;

  gram(b, L, F_bar, b.partials + kMBarPart * matrix_size(r));
  if (has_base) gram(b, L0, F_bar, b.partials + kCrossBarPart * matrix_size(r));
  sync_layer(b);

  // V^T Fbar (cayley: L^T Fbar - Fbar[:r]) and V0^T Fbar, columns multiplied by the signs
  each_entry(r, [&](int i, int j) {
    const double sign = column_sign(signs, j, negate), top = F_bar.entry(b, i, j);
    const double sum = sum_partials(b, kMBarPart, i, j);
    M_bar[i * stride + j] = (cayley ? sum - top : sum + top) * sign;
    if (has_base) cross_bar[i * stride + j] = (sum_partials(b, kCrossBarPart, i, j) + top) * sign;
  });
  if (cayley)
    each_entry(r, [&](int i, int j) { M[i * stride + j] = -2.0 * double(inner[i * r + j]); });
  else
    product(
        r, [&](int i, int k) { return double(inner[i * r + k]); },
        [&](int k, int j) { return lower(X, j, k); },
        [&](int i, int j, double sum) { M[i * stride + j] = double(inner[i * r + j]) + sum; });
  __syncthreads();

  if (has_base) {  // the base's reflectors: Fbar - V0 H with H = T0^T V0^T Fbar, and J = H M^T
    product(
        r, [&](int i, int k) { return k <= i ? double(base[k * r + i]) : 0.0; },
        [&](int k, int j) { return cross_bar[k * stride + j]; },
        [&](int i, int j, double sum) { H[i * stride + j] = sum; });
    __syncthreads();
    product(
        r,
        [&](int i, int k) {
          const double through = -double(cross[k * r + i]);
          return cayley ? through + lower(base, i, k) + (i == k ? 1.0 : 0.0) : through;
        },
        [&](int k, int j) { return H[k * stride + j]; },
        [&](int i, int j, double sum) { M_bar[i * stride + j] += sum; });
    product(
        r, [&](int i, int k) { return H[i * stride + k]; },
        [&](int k, int j) { return M[j * stride + k]; },
        [&](int i, int j, double sum) { J[i * stride + j] = sum; });
    __syncthreads();
  }

  // Backward through the inverse: U = inner^T Mbar, Sbar = -U M^T
  product(
      r, [&](int i, int k) { return double(inner[k * r + i]); },
      [&](int k, int j) { return M_bar[k * stride + j]; },
      [&](int i, int j, double sum) { U[i * stride + j] = sum; });
  __syncthreads();
  product(
      r, [&](int i, int k) { return U[i * stride + k]; },
      [&](int k, int j) { return M[j * stride + k]; },
      [&](int i, int j, double sum) { S_bar[i * stride + j] = -sum; });
  __syncthreads();

  // grad_X = tril(Fbar M^T - V0 J + V (Gbar + Gbar^T) + top, -1)
  const auto symmetric = [&](int i, int j) {
    const double here = S_bar[i * stride + j], there = S_bar[j * stride + i];
    return cayley ? here + there : (i <= j ? here : there);
  };
  float* grad_X = p.grad_X + tall;
  const Tiling tiling(r);
  const Patch patch(tiling, false);
  for (int j0 = 0; j0 < r; j0 += tiling.size)
    for (int row0 = b.first; row0 < b.last; row0 += tiling.rows) {
      float acc[4][4] = {};
      multiply_square(
          b, tiling, patch, row0, j0, F_bar,
          [&](int k, int j) { return M[j * stride + k] * column_sign(signs, k, negate); }, acc);
      multiply_square(b, tiling, patch, row0, j0, L, symmetric, acc);
      if (has_base)
        multiply_square(
            b, tiling, patch, row0, j0, L0, [&](int k, int j) { return -J[k * stride + j]; }, acc);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int c = row0 + patch.c + q * patch.step;
        if (c >= b.last) continue;
        float value[4];
#pragma unroll
        for (int jj = 0; jj < 4; ++jj) {
          const int j = j0 + patch.j + jj;
          value[jj] = c > j ? acc[jj][q] : 0.0f;
          if (c >= r || c <= j) continue;
          if (cayley)
            value[jj] = float(S_bar[c * stride + j] - S_bar[j * stride + c]);
          else
            value[jj] +=
                float(symmetric(c, j) + U[j * stride + c] - (has_base ? J[c * stride + j] : 0.0));
        }
        float* to = grad_X + int64_t(c) * r + j0 + patch.j;
        if (r % 4 == 0 && j0 + patch.j < r) {
          store<float, 4>(to, value);
        } else {
#pragma unroll
          for (int jj = 0; jj < 4; ++jj)
            if (j0 + patch.j + jj < r) to[jj] = value[jj];
        }
      }
    }
  leave_layer(b);
}

}  // namespace

cudaError_t build_backward_plan(int layers, int d, int rank, BuildPlan* plan) {
  return make_plan(build_backward_kernel, layers, d, rank, kMatrices, kPartials, plan);
}

cudaError_t build_backward(const BuildBackward& p, const BuildPlan& plan, void* scratch,
                           cudaStream_t stream) {
  return launch_build(build_backward_kernel, p, plan, kMatrices, scratch, stream);
}

}  // namespace reft_cuda
