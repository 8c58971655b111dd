// Tall [d, r] matrices of the orthonormal maps: partition of the rows, tiles, the first r rows, and
// the memory that the passes share.
#pragma once

#include "gram.h"
#include "small_linalg.h"
#include "tiles.h"
#include "vector.h"

namespace reft {
namespace REFT_ISA {

// Partition of the rows of a [d, r] matrix: chunks have partial sums of their own and are processed
// in tiles that fit in cache.
template <class T>
struct RowCut {
  RowCut(int64_t rows, int64_t rank) : d(rows), r(rank) {
    padded_r = round_up(r, kGramColumns);
    tile = r <= 32 ? 512 : 256;
    // Chosen so that the sums of all chunks take at most half the memory of X.
    chunk = r <= 128 ? 512 : 1024;
    chunks = (d + chunk - 1) / chunk;
    // One extra cache line: rows at a power-of-two distance would conflict in L1.
    ld = smaller(tile, round_up(d, kLanes<T>)) + 64 / int64_t(sizeof(T));
  }
  int64_t tall_tile() const { return padded_r * ld; }
  int64_t sums() const { return padded_r * padded_r; }
  int64_t end(int64_t chunk_index) const { return smaller(d, (chunk_index + 1) * chunk); }

  int64_t d, r, padded_r, tile, chunk, chunks, ld;
};

// How the first r rows of a tall matrix are interpreted, whatever values are stored in them: all
// zero, strictly lower triangular, or unit lower triangular.
enum class Top { blank, strictly_lower, unit_lower };

// Loads rows first_row ... first_row + count of a [d, r] matrix as a transposed tile [r, count].
template <class T>
void load_tall(const T* X, const RowCut<T>& cut, int64_t first_row, int64_t count, T* tile) {
  load_transposed(X + first_row * cut.r, count, cut.r, tile, cut.ld);
}
template <class T>
void load_tall(const T* X, const RowCut<T>& cut, int64_t first_row, int64_t count, Top top,
               T* tile) {
  load_tall(X, cut, first_row, count, tile);
  const int64_t top_count = smaller(first_row + count, cut.r) - first_row;
  if (top_count <= 0) return;
  for (int64_t j = 0; j < cut.r; ++j) {
    T* line = tile + j * cut.ld;
    const int64_t diagonal = j - first_row;
    const int64_t zeros = top == Top::blank ? top_count : smaller(top_count, diagonal + 1);
    for (int64_t n = 0; n < zeros; ++n) line[n] = 0;
    if (top == Top::unit_lower && diagonal >= 0 && diagonal < top_count) line[diagonal] = 1;
  }
}

// Reads the first r rows of X as a unit lower triangular matrix: its transpose to `upper` and, if
// `lower` is given, the matrix itself.
template <class T>
void read_top(const T* X, int64_t r, Square upper, const Square* lower = nullptr) {
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t i = 0; i < j; ++i) upper[j][i] = 0;
    upper[j][j] = 1;
    for (int64_t i = j + 1; i < r; ++i) upper[j][i] = double(X[i * r + j]);
  }
  if (lower == nullptr) return;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) (*lower)[i][j] = upper[j][i];
}

template <class T>
void read_square(const T* from, Square to) {
  for (int64_t i = 0; i < to.size; ++i)
    for (int64_t j = 0; j < to.size; ++j) to[i][j] = double(from[i * to.size + j]);
}
template <class T>
void write_square(Square from, T* to) {
  for (int64_t i = 0; i < from.size; ++i)
    for (int64_t j = 0; j < from.size; ++j) to[i * from.size + j] = T(from[i][j]);
}

// Reads T0, which base stores on and above the diagonal of its first r rows.
template <class T>
void read_upper(const T* base, Square to) {
  for (int64_t i = 0; i < to.size; ++i) {
    for (int64_t j = 0; j < i; ++j) to[i][j] = 0;
    for (int64_t j = i; j < to.size; ++j) to[i][j] = double(base[i * to.size + j]);
  }
}

// Packs a factor [r, sections * padded_r] for multiply_tile: in blocks of rows, with zeros for the
// padding rows of the tiles.
template <class T>
class PackedFactor {
 public:
  PackedFactor(T* data, const RowCut<T>& cut, int64_t sections)
      : data_(data), r_(cut.r), padded_r_(cut.padded_r), depth_(sections * cut.padded_r) {
    if (padded_r_ != r_) memset(data_, 0, size_t(r_ * depth_) * sizeof(T));
  }
  // Sets element (i, k) of the section to alpha * a[i, k].
  void fill(int64_t section, double alpha, Operand a) {
    for (int64_t block = 0; block < factor_blocks(r_); ++block) {
      int64_t row = factor_block_begin(r_, block), rows = factor_block_begin(r_, block + 1) - row;
      T* out = data_ + row * depth_ + section * padded_r_ * rows;
      for (int64_t k = 0; k < r_; ++k)
        for (int64_t i = 0; i < rows; ++i)
          out[k * rows + i] = T(alpha * a.data[(row + i) * a.row + k * a.column]);
    }
  }

 private:
  T* data_;
  int64_t r_, padded_r_, depth_;
};

// Memory that the passes over all layers share: partial sums of chunks, and the factors that solve
// computes for write.
template <class T>
struct LayerStore {
  LayerStore(const RowCut<T>& row_cut, int64_t layers, int64_t gram_sections, int64_t factors_count)
      : cut(row_cut),
        sections(gram_sections),
        factors_stride(round_up(factors_count, 64 / int64_t(sizeof(T)))),
        sums_(layers * cut.chunks * sections * cut.sums()),
        factors_(layers * factors_stride) {}
  double* sums(int64_t layer, int64_t chunk, int64_t section) const {
    return sums_ + ((layer * cut.chunks + chunk) * sections + section) * cut.sums();
  }
  T* factors(int64_t layer) const { return factors_ + layer * factors_stride; }
  void clear_sums(int64_t layer, int64_t chunk) const {
    memset(sums(layer, chunk, 0), 0, size_t(sections * cut.sums()) * sizeof(double));
  }
  // Adds the sums of all chunks to out; for symmetric sums only the upper triangle is valid.
  void add_sums(int64_t layer, int64_t section, Square out) const {
    for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
      const double* from = sums(layer, chunk, section);
      for (int64_t i = 0; i < cut.r; ++i)
        for (int64_t j = 0; j < cut.r; ++j) out[i][j] += from[i * cut.padded_r + j];
    }
  }

  RowCut<T> cut;
  int64_t sections, factors_stride;

 private:
  Scratch<double> sums_;
  Scratch<T> factors_;
};

// The tiles of one thread, stored consecutively. Their padding rows are set to zero once.
template <class T>
class TileMemory {
 public:
  TileMemory(const RowCut<T>& cut, int64_t tiles)
      : data_(tiles * cut.tall_tile()), step_(cut.tall_tile()) {
    for (int64_t i = 0; i < tiles; ++i)
      memset((*this)[i] + cut.r * cut.ld, 0, size_t((cut.padded_r - cut.r) * cut.ld) * sizeof(T));
  }
  T* operator[](int64_t i) const { return data_ + i * step_; }

 private:
  Scratch<T> data_;
  int64_t step_;
};

}  // namespace REFT_ISA
}  // namespace reft
