// Shared code of the row kernels: scratch memory, weights converted and padded, the order of the
// entries, and loads and stores of parts of rows.
#pragma once

#include "edit.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

namespace reft {
namespace REFT_ISA {

REFT_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
REFT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Uninitialized, cache-line-aligned memory, released at the end of the scope.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count = 0) { reset(count); }
  ~Scratch() { scratch_give(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void reset(int64_t count) {
    scratch_give(data_, bytes_);
    bytes_ = count > 0 ? size_t(count) * sizeof(T) : 0;
    data_ = count > 0 ? scratch_take(bytes_) : nullptr;
    if (count > 0 && data_ == nullptr) out_of_memory();
  }
  operator T*() const { return static_cast<T*>(data_); }
  T* get() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Bytes per row of one chunk, so that a chunk of all weight rows and of a few data rows fits in L1.
constexpr int64_t kChunkBytes = 2048;

template <class A>
constexpr int64_t kChunk = kChunkBytes / int64_t(sizeof(A));

template <class A>
inline int64_t padded(int64_t d) {
  return round_up(d, kLanes<A>);
}

// Extra padding of two cache lines: rows at a power-of-two distance would map to few cache sets.
template <class A>
constexpr int64_t kSkew = 128 / int64_t(sizeof(A));

// ---- weights

template <class A, class T>
inline void convert_row(const T* from, int64_t count, A* to) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  if constexpr (sizeof(T) <= sizeof(A) && sizeof(acc_t<T>) == sizeof(A)) {
    for (; i + L <= count; i += L) store(to + i, load(from + i));
  }
  for (; i < count; ++i) to[i] = A(to_acc(from[i]));
}

// Converts `count` elements of a typed tensor, starting at element `first`, to A.
template <class A>
inline void convert(Typed from, int64_t first, int64_t count, A* to) {
  switch (from.dtype) {
    case Dtype::float32:
      return convert_row(static_cast<const float*>(from.data) + first, count, to);
    case Dtype::float64:
      return convert_row(static_cast<const double*>(from.data) + first, count, to);
    case Dtype::bfloat16:
      return convert_row(static_cast<const bf16*>(from.data) + first, count, to);
    case Dtype::float16:
      return convert_row(static_cast<const fp16*>(from.data) + first, count, to);
  }
}

// A matrix [rows, d] converted to A, with each row padded with zeros to whole vectors.
template <class A>
class Panel {
 public:
  void fill(Typed from, int64_t rows, int64_t d) {
    stride = padded<A>(d) + kSkew<A>;
    data.reset(rows * stride);
    for (int64_t i = 0; i < rows; ++i) {
      convert(from, i * d, d, row(i));
      for (int64_t j = d; j < stride; ++j) row(i)[j] = A(0);
    }
  }
  void subtract(const Panel& other, int64_t rows) {
    constexpr int L = kLanes<A>;
    for (int64_t i = 0; i < rows * stride; i += L)
      store(data.get() + i, load(data.get() + i) - load(other.data.get() + i));
  }
  A* row(int64_t i) const { return data.get() + i * stride; }

  Scratch<A> data;
  int64_t stride = 0;
};

// ---- entries

// The entries to process, grouped by weight set so that a run reuses its weights from cache. The
// entries of a set keep their order.
class Order {
 public:
  explicit Order(const Selection& s)
      : plain_(s.rows == nullptr && s.weight_ids == nullptr), begins_(s.sets + 1), entries_() {
    int64_t* begins = begins_;
    if (plain_) {
      begins[0] = 0;
      // With zero entries both pointers are null, but there can be several sets.
      for (int64_t k = 1; k <= s.sets; ++k) begins[k] = s.entries;
      return;
    }
    entries_.reset(s.entries);
    for (int64_t k = 0; k <= s.sets; ++k) begins[k] = 0;
    for (int64_t n = 0; n < s.entries; ++n)
      if (wanted(s, n)) ++begins[set(s, n) + 1];
    for (int64_t k = 0; k < s.sets; ++k) begins[k + 1] += begins[k];
    // begins[k] is the write position of set k; afterwards it equals the begin of set k + 1.
    for (int64_t n = 0; n < s.entries; ++n)
      if (wanted(s, n)) entries_[begins[set(s, n)]++] = n;
    for (int64_t k = s.sets; k > 0; --k) begins[k] = begins[k - 1];
    begins[0] = 0;
  }
  int64_t begin(int64_t set) const { return begins_[set]; }
  int64_t end(int64_t set) const { return begins_[set + 1]; }
  int64_t entry(int64_t i) const { return plain_ ? i : entries_[i]; }

 private:
  static int64_t set(const Selection& s, int64_t n) { return s.weight_ids ? s.weight_ids[n] : 0; }
  static bool wanted(const Selection& s, int64_t n) {
    int64_t k = set(s, n);
    return (s.rows == nullptr || s.rows[n] >= 0) && k >= 0 && k < s.sets;
  }
  bool plain_;
  Scratch<int64_t> begins_, entries_;
};

// A run of entries of one set, processed by one thread. Its bounds depend only on the entries, not
// on the number of threads.
struct Run {
  int64_t set, begin, end;
};

class Runs {
 public:
  Runs(const Order& order, int64_t sets, int64_t longest) : runs_() {
    for (int64_t k = 0; k < sets; ++k)
      count += (order.end(k) - order.begin(k) + longest - 1) / longest;
    runs_.reset(count);
    int64_t i = 0;
    for (int64_t k = 0; k < sets; ++k)
      for (int64_t b = order.begin(k); b < order.end(k); b += longest)
        runs_[i++] = Run{k, b, smaller(b + longest, order.end(k))};
  }
  const Run& operator[](int64_t i) const { return runs_.get()[i]; }
  int64_t count = 0;

 private:
  Scratch<Run> runs_;
};

inline int64_t row_of(const Selection& s, int64_t entry) { return s.rows ? s.rows[entry] : entry; }

template <class T>
REFT_INLINE T* row_at(Rows rows, int64_t i) {
  return static_cast<T*>(rows.data) + i * rows.stride;
}

// Whether to write an output with non-temporal stores: it must not alias the input, be aligned to
// whole vectors, and be too large to stay in cache.
template <class T>
inline bool streams_out(const Selection& s, Rows in, Rows out, int64_t d) {
  constexpr int64_t kStreamedBytes = 16 << 20, kUnit = 64;
  return s.rows == nullptr && out && in.data != out.data &&
         s.entries * d * int64_t(sizeof(T)) >= kStreamedBytes &&
         d % (kUnit / int64_t(sizeof(T))) == 0 && out.stride * int64_t(sizeof(T)) % kUnit == 0 &&
         reinterpret_cast<uintptr_t>(out.data) % kUnit == 0;
}

// ---- buffer for a chunk of rows that cannot be used in place

// Buffer for one chunk of `rows` rows converted to A; the last vector is padded with zeros.
template <class A>
class Chunk {
 public:
  explicit Chunk(int64_t rows) : data_(rows * kChunk<A>), rows_(rows) {
    for (int64_t m = 0; m < rows; ++m) rows_[m] = data_ + m * kChunk<A>;
  }
  A* const* rows() const { return rows_; }

  template <class T>
  void load(T* const* rows, int64_t count, int64_t from, int64_t length) const {
    constexpr int L = kLanes<A>;
    for (int64_t m = 0; m < count; ++m) {
      const T* row = rows[m] + from;
      int64_t i = 0;
      for (; i + L <= length; i += L) store(rows_[m] + i, REFT_ISA::load(row + i));
      if (i < length) store(rows_[m] + i, load_part(row + i, int(length - i)));
    }
  }
  template <class T>
  void save(T* const* rows, int64_t count, int64_t from, int64_t length) const {
    constexpr int L = kLanes<A>;
    for (int64_t m = 0; m < count; ++m) {
      T* row = rows[m] + from;
      int64_t i = 0;
      for (; i + L <= length; i += L) store(row + i, REFT_ISA::load(rows_[m] + i));
      if (i < length) store_part(row + i, REFT_ISA::load(rows_[m] + i), int(length - i));
    }
  }

 private:
  Scratch<A> data_;
  Scratch<A*> rows_;
};

// Number of rows in a tile: a multiple of the register block such that the tile stays in L2 between
// the two products.
template <class T>
inline int64_t tile_rows(int64_t d, int64_t r) {
  constexpr int64_t kTileBytes = 512 * 1024, kSumBytes = 64 * 1024, kUnit = 12;
  int64_t by_row = kTileBytes / (d * int64_t(sizeof(T))), by_rank = kSumBytes / (r * kVectorBytes);
  int64_t rows = smaller(by_row, by_rank) / kUnit * kUnit;
  return rows < kUnit ? kUnit : smaller(rows, 4 * kUnit);
}

// Minimum number of units per thread; with less work the thread pool costs more than it gains.
inline int64_t grain_of(int64_t work_per_unit) {
  constexpr int64_t kWork = 200000;  // multiply-adds, about 10 microseconds
  return work_per_unit >= kWork ? 1 : kWork / (work_per_unit > 0 ? work_per_unit : 1);
}

}  // namespace REFT_ISA
}  // namespace reft
