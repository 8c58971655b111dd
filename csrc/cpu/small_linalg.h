// Operations on small r x r matrices in fp64: product, triangular inverse, inverse with row
// pivoting.
#pragma once

#include "gram.h"
#include "vector.h"

namespace reft {
namespace REFT_ISA {

// A square row-major matrix; rows are padded with zeros to a whole number of vectors.
struct Square {
  double* data;
  int64_t size, ld;
  double* operator[](int64_t i) const { return data + i * ld; }
};

inline int64_t square_ld(int64_t size) { return round_up(size, kLanes<double>); }
inline int64_t square_count(int64_t size) { return size * square_ld(size); }

// Allocates squares consecutively from one block of memory.
class Squares {
 public:
  Squares(double* memory, int64_t size) : next_(memory), size_(size) {}
  Square next() {
    Square out{next_, size_, square_ld(size_)};
    next_ += square_count(size_);
    for (int64_t i = 0; i < size_; ++i)
      for (int64_t j = size_; j < out.ld; ++j) out[i][j] = 0;
    return out;
  }
  Square next_zero() {
    Square out = next();
    memset(out.data, 0, size_t(square_count(size_)) * sizeof(double));
    return out;
  }

 private:
  double* next_;
  int64_t size_;
};

// The left operand of a product: element (i, k) is data[i * row + k * column]. Form::upper marks an
// upper triangular matrix, whose zeros below the diagonal are skipped.
enum class Form { full, upper };
struct Operand {
  const double* data;
  int64_t row, column;
  Form form;
};
inline Operand plain(Square a, Form form = Form::full) { return {a.data, a.ld, 1, form}; }
inline Operand transposed(Square a) { return {a.data, 1, a.ld, Form::full}; }

struct SquareSink {
  Square out;
  REFT_INLINE void operator()(int64_t i, int64_t n, vec<double> v) const { store(out[i] + n, v); }
};

// out = alpha a b, or out += alpha a b if `accumulate`; out must not alias a or b.
inline void multiply(double alpha, Operand a, Square b, Square out, bool accumulate = false) {
  constexpr int64_t kDepth = 256;
  alignas(64) double factor[kDepth * kFactorRows];
  const int64_t size = b.size;
  for (int64_t block = 0; block < factor_blocks(size); ++block) {
    int64_t row = factor_block_begin(size, block), rows = factor_block_begin(size, block + 1) - row;
    int64_t from = a.form == Form::upper ? row : 0;
    for (int64_t begin = from; begin < size; begin += kDepth) {
      int64_t depth = smaller(kDepth, size - begin);
      for (int64_t k = 0; k < depth; ++k) {
        const double* left = a.data + row * a.row + (begin + k) * a.column;
        for (int64_t i = 0; i < rows; ++i) factor[k * rows + i] = alpha * left[i * a.row];
      }
      bool onto = accumulate || begin > from;
      Addend<double> addend{onto ? out.data : nullptr, out.ld, onto ? out.ld : 0};
      multiply_block(rows, factor, depth, b[begin], b.ld, b.ld, addend, row, SquareSink{out});
    }
  }
}

// Inverse of an upper triangular matrix, computed from the last row up. Elements below the diagonal
// are not read.
inline void invert_upper(Square upper, Square inverse) {
  const int64_t n = upper.size, ld = inverse.ld;
  constexpr int L = kLanes<double>;
  for (int64_t i = n - 1; i >= 0; --i) {
    double* row = inverse[i];
    const double reciprocal = 1.0 / upper[i][i];
    for (int64_t j = 0; j < ld; ++j) row[j] = 0;
    row[i] = 1.0;
    for (int64_t k = i + 1; k < n; ++k) {
      const vec<double> factor = broadcast<double>(upper[i][k]);
      for (int64_t j = k / L * L; j < ld; j += L)
        store(row + j, load(row + j) - factor * load(inverse[k] + j));
    }
    for (int64_t j = i; j < n; ++j) row[j] *= reciprocal;
  }
}

// Inverts a in place by Gauss-Jordan elimination with row pivoting; `order` has a.size elements.
inline void invert(Square a, int64_t* order) {
  const int64_t n = a.size;
  constexpr int L = kLanes<double>;
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (__builtin_fabs(a[i][k]) > __builtin_fabs(a[pivot][k])) pivot = i;
    order[k] = pivot;
    double* row = a[k];
    if (pivot != k) {
      for (int64_t j = 0; j < a.ld; j += L) {
        vec<double> other = load(a[pivot] + j);
        store(a[pivot] + j, load(row + j));
        store(row + j, other);
      }
    }
    const double reciprocal = 1.0 / row[k];
    row[k] = 1.0;
    for (int64_t j = 0; j < n; ++j) row[j] *= reciprocal;
    for (int64_t i = 0; i < n; ++i) {
      if (i == k) continue;
      const vec<double> factor = broadcast<double>(a[i][k]);
      a[i][k] = 0.0;
      for (int64_t j = 0; j < a.ld; j += L)
        store(a[i] + j, load(a[i] + j) - factor * load(row + j));
    }
  }
  // Row exchanges of a correspond to column exchanges of its inverse, in reverse order.
  for (int64_t k = n - 1; k >= 0; --k) {
    if (order[k] == k) continue;
    for (int64_t i = 0; i < n; ++i) {
      double swap = a[i][k];
      a[i][k] = a[i][order[k]];
      a[i][order[k]] = swap;
    }
  }
}

}  // namespace REFT_ISA
}  // namespace reft
