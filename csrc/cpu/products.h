// The two products of an edit on tiles in cache: rows times weights, and rows plus S times weights.
// Callers pad to whole vectors. The order of summation does not depend on the tiling.
#pragma once

#include "vector.h"

namespace reft {
namespace REFT_ISA {

// Register block sizes: accumulators and operands must fit 32 (AVX-512) or 16 registers.
#if defined(__AVX512F__)
constexpr int kProjectRows = 3, kProjectRanks = 8, kUpdateRows = 4, kUpdateVectors = 4;
#else
constexpr int kProjectRows = 3, kProjectRanks = 4, kUpdateRows = 2, kUpdateVectors = 4;
#endif

// One number per lane, multiplied in the accumulation dtype.
template <class A>
struct Single {
  using Sum = A;
  using Number = A;  // type of weights and coefficients
  static constexpr int kNumbers = 1;
  template <class T>
  static REFT_INLINE vec<A> numbers(const T* p) {
    return load(p);
  }
  static REFT_INLINE vec<A> coefficient(const A* p) { return broadcast<A>(*p); }
  static REFT_INLINE vec<A> multiply(vec<A> a, vec<A> b, vec<A> sums) { return fma(a, b, sums); }
};

#if defined(__AVX512BF16__)
// Two adjacent bf16 numbers per lane; both products are added to an fp32 sum.
struct Paired {
  using Sum = float;
  using Number = bf16;
  static constexpr int kNumbers = 2;
  static REFT_INLINE __m512i numbers(const bf16* p) { return _mm512_loadu_si512(p); }
  static REFT_INLINE __m512i coefficient(const bf16* p) {
    int pair;
    memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static REFT_INLINE vec<float> multiply(__m512i a, __m512i b, vec<float> sums) {
    return (vec<float>)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Numbers of a row that one step of a product processes.
template <class Op>
constexpr int64_t kStep = kLanes<typename Op::Sum> * Op::kNumbers;

// Rows of a tile, starting at channel `from`.
template <class T>
struct At {
  T* const* rows;
  int64_t from;
};

template <class Op, class T, int M, int N, class A = typename Op::Sum>
REFT_INLINE void project_block(const T* const* x, int64_t from, const typename Op::Number* w,
                               int64_t stride, int64_t steps, vec<A>* sums, int64_t r) {
  vec<A> acc[M][N];
  const T* row[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    row[m] = x[m] + from;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = sums[m * r + n];
  }
  for (int64_t i = 0; i < steps; ++i) {
    decltype(Op::numbers(row[0])) a[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) a[m] = Op::numbers(row[m] + i * kStep<Op>);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const auto b = Op::numbers(w + n * stride + i * kStep<Op>);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][n] = Op::multiply(a[m], b, acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m * r + n] = acc[m][n];
}

template <class Op, class T, int M>
REFT_INLINE void project_rows(const T* const* x, int64_t from, const typename Op::Number* w,
                              int64_t stride, int64_t steps, vec<typename Op::Sum>* sums,
                              int64_t r) {
  int64_t n = 0;
  for (; n + kProjectRanks <= r; n += kProjectRanks)
    project_block<Op, T, M, kProjectRanks>(x, from, w + n * stride, stride, steps, sums + n, r);
  for (; n + 4 <= r; n += 4)
    project_block<Op, T, M, 4>(x, from, w + n * stride, stride, steps, sums + n, r);
  for (; n < r; ++n)
    project_block<Op, T, M, 1>(x, from, w + n * stride, stride, steps, sums + n, r);
}

// sums[m, k] += x[m, i] * w[k, i] per lane for i < steps * kStep, with `rows` rows of x and r rows
// of w that are `stride` apart.
template <class Op, class T>
inline void project(At<const T> x, int64_t rows, const typename Op::Number* w, int64_t stride,
                    int64_t steps, vec<typename Op::Sum>* sums, int64_t r) {
  int64_t m = 0;
  for (; m + kProjectRows <= rows; m += kProjectRows)
    project_rows<Op, T, kProjectRows>(x.rows + m, x.from, w, stride, steps, sums + m * r, r);
  for (; m < rows; ++m)
    project_rows<Op, T, 1>(x.rows + m, x.from, w, stride, steps, sums + m * r, r);
}

// Terms summed before they are added to the total; a single fp32 sum would exceed the error budget
// at rank 256.
constexpr int64_t kTerms = 32;

// A matrix of coefficients: S[i, k] starts at data + i * row + k * column and has Op::kNumbers
// numbers.
template <class N>
struct Coefficients {
  const N* data;
  int64_t row, column;
};

template <class Op, bool Stream, class To, class From, int M, int V, class A = typename Op::Sum>
REFT_INLINE void update_block(At<To> out, At<const From> base, int64_t i,
                              Coefficients<typename Op::Number> s, int64_t terms,
                              At<const typename Op::Number> b) {
  constexpr int L = kLanes<A>;
  vec<A> total[M][V] = {};
  for (int64_t begin = 0; begin < terms; begin += kTerms) {
    const int64_t end = begin + kTerms < terms ? begin + kTerms : terms;
    vec<A> acc[M][V] = {};
    for (int64_t k = begin; k < end; ++k) {
      const auto* term = b.rows[k] + (b.from + i) * Op::kNumbers;
      decltype(Op::numbers(term)) line[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) line[v] = Op::numbers(term + v * kStep<Op>);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const auto c = Op::coefficient(s.data + m * s.row + k * s.column);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[m][v] = Op::multiply(c, line[v], acc[m][v]);
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
    for (int v = 0; v < V; ++v) {
      const vec<A> sum = load(base.rows[m] + base.from + i + v * L) + total[m][v];
      if constexpr (Stream)
        stream(out.rows[m] + out.from + i + v * L, sum);
      else
        store(out.rows[m] + out.from + i + v * L, sum);
    }
}

template <class Op, bool Stream, class To, class From, int M>
REFT_INLINE void update_rows(At<To> out, At<const From> base, int64_t vectors,
                             Coefficients<typename Op::Number> s, int64_t terms,
                             At<const typename Op::Number> b) {
  constexpr int L = kLanes<typename Op::Sum>;
  int64_t v = 0;
  for (; v + kUpdateVectors <= vectors; v += kUpdateVectors)
    update_block<Op, Stream, To, From, M, kUpdateVectors>(out, base, v * L, s, terms, b);
  for (; v < vectors; ++v) update_block<Op, Stream, To, From, M, 1>(out, base, v * L, s, terms, b);
}

// out[m, i] = base[m, i] + sum_k S[m, k] * b[k, i] for i < vectors * lanes; out may alias base.
// With Op = Paired, S[m, k] and b[k, i] are pairs. Stream: use non-temporal stores.
template <class Op, class To, class From, bool Stream = false>
inline void update(At<To> out, At<const From> base, int64_t rows, int64_t vectors,
                   Coefficients<typename Op::Number> s, int64_t terms,
                   At<const typename Op::Number> b) {
  int64_t m = 0;
  auto from = [&](int64_t m) {
    return Coefficients<typename Op::Number>{s.data + m * s.row, s.row, s.column};
  };
  for (; m + kUpdateRows <= rows; m += kUpdateRows)
    update_rows<Op, Stream, To, From, kUpdateRows>(
        {out.rows + m, out.from}, {base.rows + m, base.from}, vectors, from(m), terms, b);
  for (; m < rows; ++m)
    update_rows<Op, Stream, To, From, 1>({out.rows + m, out.from}, {base.rows + m, base.from},
                                         vectors, from(m), terms, b);
}

}  // namespace REFT_ISA
}  // namespace reft
