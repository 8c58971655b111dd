// The two products of an edit on tiles that lie in cache: rows times weights, and weights added to rows.
// Both work on whole vectors, converting as they load and store; their callers pad what is not whole. Each element's sum runs
// in one order whatever the blocking, so results do not depend on how rows are grouped into tiles.
#pragma once

#include "vector.h"

namespace reft {
namespace REFT_ISA {

// Register blocks: accumulators, one operand row and one vector of the other must fit 32 (AVX-512) or 16 registers.
#if defined(__AVX512F__)
constexpr int kProjectRows = 3, kProjectRanks = 8, kUpdateRows = 4, kUpdateVectors = 4;
#else
constexpr int kProjectRows = 3, kProjectRanks = 4, kUpdateRows = 2, kUpdateVectors = 4;
#endif

// Rows of a tile from one channel on.
template <class T>
struct At {
  T* const* rows;
  int64_t from;
};

template <class A, class T, int M, int N>
REFT_INLINE void project_block(const T* const* x, int64_t from, const A* w, int64_t stride, int64_t vectors, vec<A>* sums,
                               int64_t r) {
  constexpr int L = kLanes<A>;
  vec<A> acc[M][N];
  const T* row[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    row[m] = x[m] + from;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = sums[m * r + n];
  }
  for (int64_t i = 0; i < vectors; ++i) {
    vec<A> a[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) a[m] = load(row[m] + i * L);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      vec<A> b = load(w + n * stride + i * L);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][n] = fma(a[m], b, acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m * r + n] = acc[m][n];
}

template <class A, class T, int M>
REFT_INLINE void project_rows(const T* const* x, int64_t from, const A* w, int64_t stride, int64_t vectors, vec<A>* sums,
                              int64_t r) {
  int64_t n = 0;
  for (; n + kProjectRanks <= r; n += kProjectRanks)
    project_block<A, T, M, kProjectRanks>(x, from, w + n * stride, stride, vectors, sums + n, r);
  for (; n + 4 <= r; n += 4) project_block<A, T, M, 4>(x, from, w + n * stride, stride, vectors, sums + n, r);
  for (; n < r; ++n) project_block<A, T, M, 1>(x, from, w + n * stride, stride, vectors, sums + n, r);
}

// sums[m, k] += x[m, i] * w[k, i], lane by lane, for `rows` rows of x and r rows of w, `stride` apart, i < vectors * lanes.
template <class A, class T>
inline void project(At<const T> x, int64_t rows, const A* w, int64_t stride, int64_t vectors, vec<A>* sums, int64_t r) {
  int64_t m = 0;
  for (; m + kProjectRows <= rows; m += kProjectRows)
    project_rows<A, T, kProjectRows>(x.rows + m, x.from, w, stride, vectors, sums + m * r, r);
  for (; m < rows; ++m) project_rows<A, T, 1>(x.rows + m, x.from, w, stride, vectors, sums + m * r, r);
}

// Terms summed before they join the total: one long sum of fp32 numbers loses more than the error budget at rank 256.
constexpr int64_t kTerms = 32;

// A matrix of coefficients S[i, k] = data[i * row + k * column].
template <class A>
struct Coefficients {
  const A* data;
  int64_t row, column;
};

template <class A, class To, class From, int M, int V>
REFT_INLINE void update_block(At<To> out, At<const From> base, int64_t i, Coefficients<A> s, int64_t terms, At<const A> b) {
  constexpr int L = kLanes<A>;
  vec<A> total[M][V] = {};
  for (int64_t begin = 0; begin < terms; begin += kTerms) {
    const int64_t end = begin + kTerms < terms ? begin + kTerms : terms;
    vec<A> acc[M][V] = {};
    for (int64_t k = begin; k < end; ++k) {
      const A* term = b.rows[k] + b.from + i;
      vec<A> line[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) line[v] = load(term + v * L);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        vec<A> c = broadcast<A>(s.data[m * s.row + k * s.column]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[m][v] = fma(c, line[v], acc[m][v]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) total[m][v] += acc[m][v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      store(out.rows[m] + out.from + i + v * L, load(base.rows[m] + base.from + i + v * L) + total[m][v]);
}

template <class A, class To, class From, int M>
REFT_INLINE void update_rows(At<To> out, At<const From> base, int64_t vectors, Coefficients<A> s, int64_t terms,
                             At<const A> b) {
  constexpr int L = kLanes<A>;
  int64_t v = 0;
  for (; v + kUpdateVectors <= vectors; v += kUpdateVectors)
    update_block<A, To, From, M, kUpdateVectors>(out, base, v * L, s, terms, b);
  for (; v < vectors; ++v) update_block<A, To, From, M, 1>(out, base, v * L, s, terms, b);
}

// out[m, i] = base[m, i] + sum_k S[m, k] * b[k, i] for `rows` rows, `terms` terms, i < vectors * lanes. out may be base.
template <class A, class To, class From>
inline void update(At<To> out, At<const From> base, int64_t rows, int64_t vectors, Coefficients<A> s, int64_t terms,
                   At<const A> b) {
  int64_t m = 0;
  auto from = [&](int64_t m) { return Coefficients<A>{s.data + m * s.row, s.row, s.column}; };
  for (; m + kUpdateRows <= rows; m += kUpdateRows)
    update_rows<A, To, From, kUpdateRows>({out.rows + m, out.from}, {base.rows + m, base.from}, vectors, from(m), terms, b);
  for (; m < rows; ++m)
    update_rows<A, To, From, 1>({out.rows + m, out.from}, {base.rows + m, base.from}, vectors, from(m), terms, b);
}

}  // namespace REFT_ISA
}  // namespace reft
