// Products of an edit with AVX512-BF16, which multiplies two adjacent bf16 numbers per lane.
// Weights and coefficients are rounded to bf16, sums are fp32. Same interface as plain_products.h.
#pragma once

#if defined(__AVX512BF16__)

#  include "plain_products.h"

namespace reft {
namespace REFT_ISA {

constexpr int64_t kPairedRanks = 8;  // smallest rank for which pair products are faster
constexpr int64_t kPairLanes = kStep<Paired>;
constexpr int64_t kPairSkew = 64;  // two cache lines, as in kSkew

REFT_INLINE int64_t whole_pairs(int64_t count) { return (count + 1) / 2; }

REFT_INLINE void round_row(const float* from, int64_t count, bf16* to) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i));
  for (; i < count; ++i) from_acc(from[i], to + i);
}

// Interleaves `count` elements of a and b (null: zeros) as a0 b0 a1 b1 ..., padded with zeros to
// whole vectors.
inline void interleave(const bf16* a, const bf16* b, int64_t count, bf16* to) {
  alignas(64) static const uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                               37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                               11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(low),
                second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int64_t i = 0; i < count; i += kPairLanes) {
    const __mmask32 mask =
        count - i >= kPairLanes ? ~__mmask32(0) : (__mmask32(1) << (count - i)) - 1;
    const __m512i x = _mm512_maskz_loadu_epi16(mask, a + i);
    const __m512i y = b ? _mm512_maskz_loadu_epi16(mask, b + i) : _mm512_setzero_si512();
    _mm512_storeu_si512(to + 2 * i, _mm512_permutex2var_epi16(x, first, y));
    _mm512_storeu_si512(to + 2 * i + kPairLanes, _mm512_permutex2var_epi16(x, second, y));
  }
}

// Weights rounded to bf16, padded with zeros to whole vectors: single rows for `project`, and
// interleaved pairs of rows of a set for `add`.
class PairedPanel {
 public:
  void reset(int64_t sets, int64_t ranks, int64_t d) {
    r_ = ranks;
    const int64_t width = round_up(d, kPairLanes);
    stride = width + kPairSkew;
    pair_stride = 2 * width + kPairSkew;
    rows_.reset(sets * r_ * stride);
  }
  // Sets row i from d fp32 numbers.
  void set_row(int64_t i, const float* from, int64_t d) {
    bf16* to = rows_ + i * stride;
    round_row(from, d, to);
    memset(to + d, 0, size_t(stride - d) * sizeof(bf16));
  }
  void pair(int64_t sets, int64_t d) {
    pairs_.reset(sets * whole_pairs(r_) * pair_stride);
    for (int64_t s = 0; s < sets; ++s)
      for (int64_t k = 0; k < r_; k += 2)
        interleave(row(s * r_ + k), k + 1 < r_ ? row(s * r_ + k + 1) : nullptr, d,
                   pairs_ + (s * whole_pairs(r_) + k / 2) * pair_stride);
  }
  const bf16* row(int64_t i) const { return rows_ + i * stride; }
  const bf16* pair_row(int64_t set, int64_t p) const {
    return pairs_ + (set * whole_pairs(r_) + p) * pair_stride;
  }
  int64_t stride = 0, pair_stride = 0;

 private:
  Scratch<bf16> rows_, pairs_;
  int64_t r_ = 0;
};

template <class T>
class PairedProducts : public Parts<float> {
 public:
  using A = float;
  using Lines = At<const bf16>;

  PairedProducts(const EditWeights& w, int64_t sets, int64_t tile_rows, bool backward)
      : Parts<A>(w, sets, tile_rows) {
    write_.reset(sets, r, d);
    if (reads) read_.reset(sets, r, d);
    Scratch<A> write(d), read(d);
    for (int64_t i = 0; i < sets * r; ++i) {
      convert(w.write, i * d, d, write.get());
      write_.set_row(i, write, d);
      if (!reads) continue;
      convert(w.read, i * d, d, read.get());
      for (int64_t j = 0; j < d && folded; ++j) read[j] -= write[j];
      read_.set_row(i, read, d);
    }
    write_.pair(sets, d);
    // The forward uses read for `project` only, so it needs no interleaved pairs.
    if (reads && backward) read_.pair(sets, d);
  }

  struct Work {
    explicit Work(const PairedProducts& p)
        : sums(p.tile * p.r),
          rows(p.tile * kChunk<A>),
          lines(whole_pairs(p.tile) * 2 * kChunk<A>),
          row_at(p.tile),
          line_at(whole_pairs(p.tile)),
          sums_at(p.r) {
      for (int64_t m = 0; m < p.tile; ++m) row_at[m] = rows + m * kChunk<A>;
      for (int64_t m = 0; m < whole_pairs(p.tile); ++m) line_at[m] = lines + m * 2 * kChunk<A>;
    }
    Scratch<vec<A>> sums;
    Scratch<bf16> rows, lines;  // a chunk of the rows, and the same rows interleaved in pairs
    Scratch<bf16*> row_at;
    Scratch<const bf16*> line_at;
    Scratch<A*> sums_at;
  };

  class ByTerm {
   public:
    explicit ByTerm(const PairedProducts& p)
        : coefficients(p.tile * 4 * whole_pairs(p.r)), weights(2 * whole_pairs(p.r)) {}
    void fill(const PairedProducts& p, int64_t set, const A* s, int64_t count, bool read,
              bool write) {
      const int64_t half = whole_pairs(p.r), parts = read + write;
      pairs = 0;
      for (int64_t k = 0; k < half && read; ++k) weights[pairs++] = p.read_.pair_row(set, k);
      for (int64_t k = 0; k < half && write; ++k) weights[pairs++] = p.write_.pair_row(set, k);
      for (int64_t m = 0; m < count; ++m)
        for (int64_t part = 0; part < parts; ++part) {
          const A* from = s + (m * parts + part) * p.r;
          bf16* to = coefficients + 2 * (m * pairs + part * half);
          round_row(from, p.r, to);
          if (p.r % 2) to[p.r].bits = 0;
        }
    }
    Coefficients<bf16> view() const { return {coefficients, 2 * pairs, 2}; }
    Scratch<bf16> coefficients;
    Scratch<const bf16*> weights;
    int64_t pairs = 0;
  };

  class ByRow {
   public:
    explicit ByRow(const PairedProducts& p) : coefficients(p.r * 2 * whole_pairs(p.tile)) {}
    void fill(const PairedProducts& p, const A* s, int64_t stride, int64_t count) {
      pairs = whole_pairs(count);
      for (int64_t k = 0; k < p.r; ++k) {
        bf16* to = coefficients + 2 * k * pairs;
        for (int64_t m = 0; m < count; ++m) from_acc(s[m * stride + k], to + m);
        if (count % 2) to[count].bits = 0;
      }
    }
    Coefficients<bf16> view() const { return {coefficients, 2 * pairs, 2}; }
    Scratch<bf16> coefficients;
    int64_t pairs = 0;
  };

  void project(bool read, T* const* rows, int64_t count, int64_t set, Work& b, A* out) const {
    const PairedPanel& panel = read ? read_ : write_;
    for (int64_t i = 0; i < count * r; ++i) b.sums[i] = vec<A>{};
    for (int64_t from = 0; from < d; from += kChunk<A>) {
      const int64_t length = smaller(d - from, kChunk<A>),
                    steps = round_up(length, kPairLanes) / kPairLanes;
      const bool in_place = length % kPairLanes == 0;
      if (!in_place) load_rows(rows, count, from, length, b);
      const At<const T> x = in_place ? At<const T>{rows, from} : At<const T>{b.row_at, 0};
      REFT_ISA::project<Paired, T>(x, count, panel.row(set * r) + from, panel.stride, steps, b.sums,
                                   r);
    }
    for (int64_t i = 0; i < count * r; ++i) out[i] = lane_sum<A>(b.sums[i]);
  }

  void add(T* const* out, T* const* base, int64_t count, int64_t from, int64_t length,
           const ByTerm& s, bool streams, Work& b) const {
    if (whole<A>(length)) {
      const At<T> to{out, from};
      const At<const T> in{base, from};
      const int64_t vectors = length / kLanes<A>;
      if (streams)
        update<Paired, T, T, true>(to, in, count, vectors, s.view(), s.pairs, {s.weights, from});
      else
        update<Paired, T, T>(to, in, count, vectors, s.view(), s.pairs, {s.weights, from});
      return;
    }
    add_to_buffer(base, count, from, length, s, b);
    for (int64_t m = 0; m < count; ++m)
      memcpy(out[m] + from, b.row_at[m], size_t(length) * sizeof(bf16));
  }

  Lines lines_of(T* const* rows, int64_t count, int64_t from, int64_t length, Work& b) const {
    for (int64_t m = 0; m < count; m += 2)
      interleave(rows[m] + from, m + 1 < count ? rows[m + 1] + from : nullptr, length,
                 b.lines + m * kChunk<A>);
    return {b.line_at, 0};
  }

  Lines rebuilt(T* const* base, int64_t count, int64_t from, int64_t length, const ByTerm& s,
                Work& b) const {
    add_to_buffer(base, count, from, length, s, b);
    return lines_of(b.row_at, count, 0, length, b);
  }

  void outer(const ByRow& s, Lines lines, int64_t from, int64_t length, A* sums, int64_t stride,
             Work& b) const {
    for (int64_t k = 0; k < r; ++k) b.sums_at[k] = sums + k * stride;
    const int64_t vectors = padded<A>(length) / kLanes<A>;
    update<Paired, A, A>({b.sums_at, from}, {b.sums_at, from}, r, vectors, s.view(), s.pairs,
                         lines);
  }

 private:
  void load_rows(T* const* rows, int64_t count, int64_t from, int64_t length, Work& b) const {
    for (int64_t m = 0; m < count; ++m) {
      memcpy(b.row_at[m], rows[m] + from, size_t(length) * sizeof(bf16));
      memset(b.row_at[m] + length, 0, size_t(round_up(length, kPairLanes) - length) * sizeof(bf16));
    }
  }
  void add_to_buffer(T* const* base, int64_t count, int64_t from, int64_t length, const ByTerm& s,
                     Work& b) const {
    At<const T> in{base, from};
    if (!whole<A>(length)) {
      load_rows(base, count, from, length, b);
      in = {b.row_at, 0};
    }
    update<Paired, T, T>({b.row_at, 0}, in, count, padded<A>(length) / kLanes<A>, s.view(), s.pairs,
                         {s.weights, from});
  }

  PairedPanel read_, write_;
};

}  // namespace REFT_ISA
}  // namespace reft

#endif  // __AVX512BF16__
