// Products of an edit in the accumulation dtype; rows are converted as they are loaded.
//
// A products class stores the weights in the layout of its instructions and computes on tiles of
// rows:
//   project   rows times the weights of a set: [row, rank]
//   add       rows + S times weights, with coefficients S [row, term]
//   outer     sums [rank, channel] += S^T times rows, with coefficients S [row, rank]
// Coefficients are prepared once per tile (ByTerm, ByRow), the rows for `outer` once per chunk
// (lines_of, rebuilt).
#pragma once

#include "activations.h"
#include "products.h"
#include "tiles.h"

namespace reft {
namespace REFT_ISA {

// The optional parts of an edit, and its biases.
template <class A>
struct Parts {
  int64_t d, r, tile;
  // folded: read_ holds A - B, so B x needs no product. projects: B x is a separate product.
  bool folded, reads, projects;
  Scratch<A> read_bias, subtract_bias;

  Parts(const EditWeights& w, int64_t sets, int64_t tile_rows) : d(w.d), r(w.r), tile(tile_rows) {
    folded = w.subtract_projection && w.activation == Activation::linear;
    reads = bool(w.read);
    projects = w.subtract_projection && !(folded && reads);
    fill(w.read_bias, sets * r, read_bias);
    fill(w.subtract_bias, sets * r, subtract_bias);
  }
  int64_t terms() const { return (reads + projects) * r; }

 private:
  static void fill(Typed from, int64_t count, Scratch<A>& to) {
    if (!from) return;
    to.reset(count);
    convert(from, 0, count, to.get());
  }
};

template <class A>
inline bool whole(int64_t length) {
  return length % kLanes<A> == 0;
}

template <class T>
class PlainProducts : public Parts<acc_t<T>> {
 public:
  using A = acc_t<T>;
  using Parts<A>::d;
  using Parts<A>::r;
  using Parts<A>::tile;
  using Lines = At<const A>;

  PlainProducts(const EditWeights& w, int64_t sets, int64_t tile_rows, bool)
      : Parts<A>(w, sets, tile_rows) {
    write_.fill(w.write, sets * r, d);
    if (!this->reads) return;
    read_.fill(w.read, sets * r, d);
    if (this->folded) read_.subtract(write_, sets * r);
  }

  // Work memory of one thread.
  struct Work {
    explicit Work(const PlainProducts& p)
        : sums(p.tile * p.r), rows(p.tile), base(p.tile), lines(p.r) {}
    Scratch<vec<A>> sums;
    Chunk<A> rows, base;
    Scratch<A*> lines;
  };

  // Coefficients S [row, term] for the weights of read, write, or read followed by write.
  class ByTerm {
   public:
    explicit ByTerm(const PlainProducts& p) : weights(2 * p.r) {}
    void fill(const PlainProducts& p, int64_t set, const A* s, int64_t, bool read, bool write) {
      terms = 0;
      for (int64_t k = 0; k < p.r && read; ++k) weights[terms++] = p.read_.row(set * p.r + k);
      for (int64_t k = 0; k < p.r && write; ++k) weights[terms++] = p.write_.row(set * p.r + k);
      coefficients = {s, terms, 1};
    }
    Coefficients<A> coefficients;
    int64_t terms = 0;
    Scratch<const A*> weights;
  };

  // Coefficients S [row, rank]; rows are `stride` apart.
  class ByRow {
   public:
    explicit ByRow(const PlainProducts&) {}
    void fill(const PlainProducts&, const A* s, int64_t stride, int64_t rows) {
      coefficients = {s, 1, stride};
      count = rows;
    }
    Coefficients<A> coefficients;
    int64_t count = 0;
  };

  // out [row, rank] = rows times read or write of a set. Lanes are summed once, at the end of a
  // row.
  void project(bool read, T* const* rows, int64_t count, int64_t set, Work& b, A* out) const {
    const Panel<A>& panel = read ? read_ : write_;
    // Otherwise convert each row once to a buffer instead of once for each block of ranks.
    const bool convert_on_load = sizeof(T) == sizeof(A) || r <= kProjectRanks;
    for (int64_t i = 0; i < count * r; ++i) b.sums[i] = vec<A>{};
    for (int64_t from = 0; from < d; from += kChunk<A>) {
      const int64_t length = smaller(d - from, kChunk<A>), vectors = padded<A>(length) / kLanes<A>;
      const A* weights = panel.row(set * r) + from;
      if (convert_on_load && whole<A>(length)) {
        REFT_ISA::project<Single<A>, T>({rows, from}, count, weights, panel.stride, vectors, b.sums,
                                        r);
      } else {
        b.rows.load(rows, count, from, length);
        REFT_ISA::project<Single<A>, A>({b.rows.rows(), 0}, count, weights, panel.stride, vectors,
                                        b.sums, r);
      }
    }
    for (int64_t i = 0; i < count * r; ++i) out[i] = lane_sum<A>(b.sums[i]);
  }

  // out = base + S times weights for one chunk, in place for whole vectors, else through a buffer.
  // `streams` selects non-temporal stores, used for whole vectors only.
  void add(T* const* out, T* const* base, int64_t count, int64_t from, int64_t length,
           const ByTerm& s, bool streams, Work& b) const {
    const A* const* weights = s.weights;
    if (whole<A>(length)) {
      const At<T> to{out, from};
      const At<const T> in{base, from};
      const int64_t vectors = length / kLanes<A>;
      if (streams)
        update<Single<A>, T, T, true>(to, in, count, vectors, s.coefficients, s.terms,
                                      {weights, from});
      else
        update<Single<A>, T, T>(to, in, count, vectors, s.coefficients, s.terms, {weights, from});
      return;
    }
    add_to_buffer(base, count, from, length, s, b.rows);
    b.rows.save(out, count, from, length);
  }

  // Rows in the accumulation dtype for `outer`: in place if possible, else converted to a buffer.
  Lines lines_of(T* const* rows, int64_t count, int64_t from, int64_t length, Work& b) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (whole<A>(length)) return {rows, from};
    }
    b.rows.load(rows, count, from, length);
    return {b.rows.rows(), 0};
  }

  // Same as lines_of for the rows base + S times weights.
  Lines rebuilt(T* const* base, int64_t count, int64_t from, int64_t length, const ByTerm& s,
                Work& b) const {
    add_to_buffer(base, count, from, length, s, b.base);
    return {b.base.rows(), 0};
  }

  // sums[k, from + i] += sum_m S[m, k] line[m, i]; rows of sums are `stride` apart and padded to
  // whole vectors.
  void outer(const ByRow& s, Lines lines, int64_t from, int64_t length, A* sums, int64_t stride,
             Work& b) const {
    for (int64_t k = 0; k < r; ++k) b.lines[k] = sums + k * stride;
    const int64_t vectors = padded<A>(length) / kLanes<A>;
    update<Single<A>, A, A>({b.lines, from}, {b.lines, from}, r, vectors, s.coefficients, s.count,
                            lines);
  }

 private:
  void add_to_buffer(T* const* base, int64_t count, int64_t from, int64_t length, const ByTerm& s,
                     const Chunk<A>& out) const {
    const int64_t vectors = padded<A>(length) / kLanes<A>;
    const A* const* weights = s.weights;
    if (whole<A>(length)) {
      update<Single<A>, A, T>({out.rows(), 0}, {base, from}, count, vectors, s.coefficients,
                              s.terms, {weights, from});
      return;
    }
    out.load(base, count, from, length);
    update<Single<A>, A, A>({out.rows(), 0}, {out.rows(), 0}, count, vectors, s.coefficients,
                            s.terms, {weights, from});
  }

  Panel<A> read_, write_;
};

}  // namespace REFT_ISA
}  // namespace reft
