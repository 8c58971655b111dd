// Products of tall [d, r] matrices, one tile of rows at a time. Tiles are transposed on load, so
// that vectors run along d for every r.
#pragma once

#include "tiles.h"
#include "vector.h"

namespace reft {
namespace REFT_ISA {

// ---- transposition in registers, in units of 16 bytes of a row

template <class T>
constexpr int kQuad = 16 / int(sizeof(T));  // 4 floats or 2 doubles

#if defined(__AVX512F__)
// Mask for the masked forms of intrinsics; GCC 12 warns about the unmasked ones.
constexpr __mmask16 kAll = 0xffff;
#endif

// Interleave the low (high) halves of a and b within each 16-byte lane.
REFT_INLINE vec<float> interleave_low(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_maskz_unpacklo_ps(kAll, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vec<float>)_mm256_unpacklo_ps((__m256)a, (__m256)b);
#else
  return vec<float>{a[0], b[0], a[1], b[1]};
#endif
}
REFT_INLINE vec<float> interleave_high(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_maskz_unpackhi_ps(kAll, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vec<float>)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
  return vec<float>{a[2], b[2], a[3], b[3]};
#endif
}
REFT_INLINE vec<double> interleave_low(vec<double> a, vec<double> b) {
#if defined(__AVX512F__)
  return (vec<double>)_mm512_maskz_unpacklo_pd(__mmask8(kAll), (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vec<double>)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
#else
  return vec<double>{a[0], b[0]};
#endif
}
REFT_INLINE vec<double> interleave_high(vec<double> a, vec<double> b) {
#if defined(__AVX512F__)
  return (vec<double>)_mm512_maskz_unpackhi_pd(__mmask8(kAll), (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vec<double>)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
#else
  return vec<double>{a[1], b[1]};
#endif
}

// Transposes the 4 x 4 (or 2 x 2) matrix in each 16-byte lane.
REFT_INLINE void transpose_quads(vec<float> (&v)[4]) {
  vec<double> a = (vec<double>)interleave_low(v[0], v[1]),
              b = (vec<double>)interleave_high(v[0], v[1]);
  vec<double> c = (vec<double>)interleave_low(v[2], v[3]),
              d = (vec<double>)interleave_high(v[2], v[3]);
  v[0] = (vec<float>)interleave_low(a, c);
  v[1] = (vec<float>)interleave_high(a, c);
  v[2] = (vec<float>)interleave_low(b, d);
  v[3] = (vec<float>)interleave_high(b, d);
}
REFT_INLINE void transpose_quads(vec<double> (&v)[2]) {
  vec<double> low = interleave_low(v[0], v[1]);
  v[1] = interleave_high(v[0], v[1]);
  v[0] = low;
}

#if defined(__AVX2__) || defined(__AVX512F__)
template <class T>
REFT_INLINE __m128 load_quad(const T* p) {
  return _mm_loadu_ps(reinterpret_cast<const float*>(p));
}
template <class T>
REFT_INLINE void store_quad(T* p, __m128 v) {
  _mm_storeu_ps(reinterpret_cast<float*>(p), v);
}
#endif

// Loads 16 bytes from each of p, p + stride, ... into the lanes of one vector.
template <class T>
REFT_INLINE vec<T> load_quads(const T* p, int64_t stride) {
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(load_quad(p));
  v = _mm512_insertf32x4(v, load_quad(p + stride), 1);
  v = _mm512_insertf32x4(v, load_quad(p + 2 * stride), 2);
  return (vec<T>)_mm512_insertf32x4(v, load_quad(p + 3 * stride), 3);
#elif defined(__AVX2__)
  return (vec<T>)_mm256_insertf128_ps(_mm256_castps128_ps256(load_quad(p)), load_quad(p + stride),
                                      1);
#else
  (void)stride;
  return load(p);
#endif
}
template <class T>
REFT_INLINE void store_quads(T* p, int64_t stride, vec<T> v) {
#if defined(__AVX512F__)
  store_quad(p, _mm512_maskz_extractf32x4_ps(__mmask8(kAll), (__m512)v, 0));
  store_quad(p + stride, _mm512_maskz_extractf32x4_ps(__mmask8(kAll), (__m512)v, 1));
  store_quad(p + 2 * stride, _mm512_maskz_extractf32x4_ps(__mmask8(kAll), (__m512)v, 2));
  store_quad(p + 3 * stride, _mm512_maskz_extractf32x4_ps(__mmask8(kAll), (__m512)v, 3));
#elif defined(__AVX2__)
  store_quad(p, _mm256_castps256_ps128((__m256)v));
  store_quad(p + stride, _mm256_extractf128_ps((__m256)v, 1));
#else
  (void)stride;
  store(p, v);
#endif
}

// tile[j, i] = rows[i, j] for `count` rows of r elements; tile columns are padded with zeros to a
// whole vector.
template <class T>
void load_transposed(const T* rows, int64_t count, int64_t r, T* tile, int64_t ld) {
  constexpr int L = kLanes<T>, Q = kQuad<T>;
  int64_t i = 0;
  if (r >= Q) {
    for (; i + L <= count; i += L) {
      for (int64_t begin = 0; begin < r; begin += Q) {
        int64_t j = smaller(begin, r - Q);  // the last block overlaps the one before
        vec<T> v[Q];
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) v[q] = load_quads(rows + (i + q) * r + j, Q * r);
        transpose_quads(v);
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) store(tile + (j + q) * ld + i, v[q]);
      }
    }
  }
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t k = i; k < count; ++k) tile[j * ld + k] = rows[k * r + j];
    for (int64_t k = count; k < round_up(count, L); ++k) tile[j * ld + k] = 0;
  }
}

// rows[i, j] = tile[j, i] for `count` rows of r elements.
template <class T>
void store_transposed(const T* tile, int64_t ld, int64_t count, int64_t r, T* rows) {
  constexpr int L = kLanes<T>, Q = kQuad<T>;
  int64_t i = 0;
  if (r >= Q) {
    for (; i + L <= count; i += L) {
      for (int64_t begin = 0; begin < r; begin += Q) {
        int64_t j = smaller(begin, r - Q);
        vec<T> v[Q];
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) v[q] = load(tile + (j + q) * ld + i);
        transpose_quads(v);
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) store_quads(rows + (i + q) * r + j, Q * r, v[q]);
      }
    }
  }
  for (int64_t k = i; k < count; ++k)
    for (int64_t j = 0; j < r; ++j) rows[k * r + j] = tile[j * ld + k];
}

// ---- Gram matrices of tiles

#if defined(__AVX512F__)
constexpr int kGramRows = 4;  // kGramRows x kGramColumns accumulators
#else
constexpr int kGramRows = 2;
#endif
constexpr int kGramColumns = 4;

template <class V, int I, int J>
REFT_INLINE void clear(V (&acc)[I][J]) {
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) acc[i][j] = V{};
}

// sums[q] += the sum of the lanes of v[q], in a fixed order.
template <class T>
REFT_INLINE void add_lane_sums(vec<T> (&v)[kGramColumns], double* sums) {
  constexpr int Q = kQuad<T>;
#pragma GCC unroll 8
  for (int first = 0; first < kGramColumns; first += Q) {
    vec<T> quads[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) quads[q] = v[first + q];
    transpose_quads(quads);
    vec<T> sum = quads[0] + quads[1];
    if constexpr (Q == 4) sum += quads[2] + quads[3];
    T lanes[kLanes<T>];
    store(lanes, sum);
    for (int half = kLanes<T> / 2; half >= Q; half /= 2)
      for (int q = 0; q < half; ++q) lanes[q] += lanes[q + half];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) sums[first + q] += double(lanes[q]);
  }
}

// Number of terms a lane sums in T before the result is added to the fp64 sums. Small matrices use
// fewer, as their sums are cheap.
REFT_INLINE int64_t gram_chain(int64_t size) { return size <= kGramColumns ? 4 : 16; }

// sums[i, j] += sum_n a[i, n] b[j, n] for two tiles of `size` rows (a multiple of 4); only the
// upper triangle if `upper`.
template <class T>
void add_gram(const T* a, const T* b, int64_t size, int64_t ld, int64_t columns, bool upper,
              double* sums) {
  constexpr int L = kLanes<T>, I = kGramRows, J = kGramColumns;
  const int64_t chain = gram_chain(size) * L;
  for (int64_t i0 = 0; i0 < size; i0 += I) {
    for (int64_t j0 = upper ? i0 / J * J : 0; j0 < size; j0 += J) {
      const T *ai = a + i0 * ld, *bj = b + j0 * ld;
      for (int64_t n = 0; n < columns;) {
        vec<T> acc[I][J];
        clear(acc);
        for (const int64_t end = smaller(columns, n + chain); n < end; n += L) {
          vec<T> left[I];
#pragma GCC unroll 8
          for (int i = 0; i < I; ++i) left[i] = load(ai + i * ld + n);
#pragma GCC unroll 8
          for (int j = 0; j < J; ++j) {
            vec<T> right = load(bj + j * ld + n);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i) acc[i][j] = fma(left[i], right, acc[i][j]);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) add_lane_sums<T>(acc[i], sums + (i0 + i) * size + j0);
      }
    }
  }
}

// ---- products of factors and tiles

constexpr int kFactorRows = 6;  // rows of a factor in one register block
// Terms summed consecutively before they are added to the total; 32 would exceed the error budget.
constexpr int kFactorChain = 16;
#if defined(__AVX512F__)
constexpr int kFactorVectors = 4;  // vectors of the result per register block row
#else
constexpr int kFactorVectors = 2;
#endif

// Splits rows evenly into blocks of at most kFactorRows, for example 8 = 4 + 4.
REFT_INLINE int64_t factor_blocks(int64_t rows) { return (rows + kFactorRows - 1) / kFactorRows; }
REFT_INLINE int64_t factor_block_begin(int64_t rows, int64_t block) {
  return block * rows / factor_blocks(rows);
}

// Matrix that a product is added to. Columns from `columns` on are taken as zero.
template <class T>
struct Addend {
  const T* data;
  int64_t ld, columns;
};

// acc += I rows of a packed factor times `depth` rows of J vectors.
template <int I, int J, class T>
REFT_INLINE void multiply_chain(const T* factor, int64_t depth, const T* b, int64_t ld,
                                vec<T> (&acc)[I][J]) {
  for (int64_t k = 0; k < depth; ++k, b += ld, factor += I) {
    vec<T> right[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) right[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      vec<T> left = broadcast<T>(factor[i]);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) acc[i][j] = fma(left, right[j], acc[i][j]);
    }
  }
}

template <int I, int J, class T, class Sink>
REFT_INLINE void multiply_registers(const T* factor, int64_t depth, const T* b, int64_t ld,
                                    Addend<T> addend, int64_t row, int64_t column,
                                    const Sink& sink) {
  constexpr int L = kLanes<T>;
  vec<T> acc[I][J];
  clear(acc);
  multiply_chain<I, J>(factor, smaller(depth, kFactorChain), b + column, ld, acc);
  for (int64_t k = kFactorChain; k < depth; k += kFactorChain) {
    vec<T> next[I][J];
    clear(next);
    multiply_chain<I, J>(factor + k * I, smaller(depth - k, kFactorChain), b + k * ld + column, ld,
                         next);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) acc[i][j] += next[i][j];
  }
  // Added last, because it can be much larger than the product, whose small terms would lose
  // accuracy.
  if (column < addend.columns) {
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j)
        acc[i][j] += load(addend.data + (row + i) * addend.ld + column + j * L);
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sink(row + i, column + j * L, acc[i][j]);
}

template <int J, class T, class Sink>
void multiply_strip(int64_t rows, const T* factor, int64_t depth, const T* b, int64_t ld,
                    Addend<T> addend, int64_t row, int64_t column, const Sink& sink) {
  switch (rows) {
    case 1:
      return multiply_registers<1, J>(factor, depth, b, ld, addend, row, column, sink);
    case 2:
      return multiply_registers<2, J>(factor, depth, b, ld, addend, row, column, sink);
    case 3:
      return multiply_registers<3, J>(factor, depth, b, ld, addend, row, column, sink);
    case 4:
      return multiply_registers<4, J>(factor, depth, b, ld, addend, row, column, sink);
    case 5:
      return multiply_registers<5, J>(factor, depth, b, ld, addend, row, column, sink);
    case 6:
      return multiply_registers<6, J>(factor, depth, b, ld, addend, row, column, sink);
  }
}

// Multiplies one block of rows of a packed factor ([depth, rows], see factor_blocks) by b [depth,
// columns]; columns is a whole number of vectors.
template <class T, class Sink>
void multiply_block(int64_t rows, const T* factor, int64_t depth, const T* b, int64_t ld,
                    int64_t columns, Addend<T> addend, int64_t row, const Sink& sink) {
  constexpr int L = kLanes<T>, J = kFactorVectors;
  int64_t column = 0;
  for (; column + J * L <= columns; column += J * L)
    multiply_strip<J>(rows, factor, depth, b, ld, addend, row, column, sink);
  for (; column < columns; column += L)
    multiply_strip<1>(rows, factor, depth, b, ld, addend, row, column, sink);
}

// Calls sink(i, n, (addend + factor b)[i, n : n + kLanes]) for a packed factor [rows, depth] and a
// tile b [depth, columns].
template <class T, class Sink>
void multiply_tile(const T* factor, int64_t rows, int64_t depth, const T* b, int64_t ld,
                   int64_t columns, Addend<T> addend, const Sink& sink) {
  constexpr int L = kLanes<T>, J = kFactorVectors;
  int64_t width = J * L;  // a strip of b stays in L1 for all rows of the factor
  for (int64_t column = 0; column < columns; column += width) {
    if (column + width > columns) width = L;
    for (int64_t block = 0; block < factor_blocks(rows); ++block) {
      int64_t row = factor_block_begin(rows, block),
              count = factor_block_begin(rows, block + 1) - row;
      if (width > L)
        multiply_strip<J>(count, factor + row * depth, depth, b, ld, addend, row, column, sink);
      else
        multiply_strip<1>(count, factor + row * depth, depth, b, ld, addend, row, column, sink);
    }
  }
}

}  // namespace REFT_ISA
}  // namespace reft
