// The edit: y = x + B^T (coeff * u), u = act(A x + c) - (B x + p), forward and backward, one pass over the rows each.
#pragma once

#include "activations.h"
#include "products.h"
#include "tiles.h"

namespace reft {
namespace REFT_ISA {

// The weights of an edit as panels of the accumulation dtype.
template <class A>
struct Panels {
  Panel<A> read, write;       // read holds A - B where folded
  Scratch<A> read_bias, subtract_bias;
  bool folded, reads, projects;  // projects: B x is subtracted apart

  Panels(const EditWeights& w, int64_t sets) {
    folded = w.subtract && w.activation == Activation::linear;
    reads = bool(w.read);
    projects = w.subtract && !(folded && reads);
    write.fill(w.write, sets * w.r, w.d);
    if (reads) {
      read.fill(w.read, sets * w.r, w.d);
      if (folded) read.subtract(write, sets * w.r);
    }
    fill(w.read_bias, sets * w.r, read_bias);
    fill(w.subtract_bias, sets * w.r, subtract_bias);
  }

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

template <class A>
inline int64_t chunk_length(int64_t d, int64_t from) {
  return smaller(d - from, kChunk<A>);
}

// out = the rows of a tile times `panel`'s rows of a set; the lanes are added once, at the end of the row.
template <class T, class A>
inline void project_tile(T* const* rows, int64_t count, const Panel<A>& panel, int64_t set, int64_t d, int64_t r,
                         const Chunk<A>& buffer, vec<A>* sums, A* out) {
  const bool once = sizeof(T) == sizeof(A) || r <= kProjectRanks;  // else a row is converted once, not for each block of ranks
  for (int64_t i = 0; i < count * r; ++i) sums[i] = vec<A>{};
  for (int64_t from = 0; from < d; from += kChunk<A>) {
    const int64_t length = chunk_length<A>(d, from), vectors = padded<A>(length) / kLanes<A>;
    const A* weights = panel.row(set * r) + from;
    if (once && whole<A>(length)) {
      project<A, T>({rows, from}, count, weights, panel.stride, vectors, sums, r);
    } else {
      buffer.load(rows, count, from, length);
      project<A, A>({buffer.rows(), 0}, count, weights, panel.stride, vectors, sums, r);
    }
  }
  for (int64_t i = 0; i < count * r; ++i) out[i] = lane_sum<A>(sums[i]);
}

// One chunk of rows of T plus products, from `base` to `out`: in place where it is whole vectors, else through the buffer.
template <class T, class A>
inline void update_chunk(T* const* out, T* const* base, int64_t count, int64_t from, int64_t length, const Chunk<A>& buffer,
                         Coefficients<A> s, int64_t terms, const A* const* b) {
  if (whole<A>(length)) {
    update<A, T, T>({out, from}, {base, from}, count, length / kLanes<A>, s, terms, {b, from});
    return;
  }
  buffer.load(base, count, from, length);
  update<A, A, A>({buffer.rows(), 0}, {buffer.rows(), 0}, count, padded<A>(length) / kLanes<A>, s, terms, {b, from});
  buffer.save(out, count, from, length);
}

template <class T>
inline void edit(const EditForward& e) {
  using A = acc_t<T>;
  const EditWeights& w = e.weights;
  const int64_t d = w.d, r = w.r, sets = e.selection.sets, longest = tile_rows<T>(d, r);
  const Panels<A> panels(w, sets);
  const Order order(e.selection);
  const Runs runs(order, sets, longest);
  A* const all_u = static_cast<A*>(e.u);
  A* const all_z = static_cast<A*>(e.z);
  if (all_u) memset(all_u, 0, size_t(e.selection.entries * r) * sizeof(A));  // skipped entries
  if (all_z) memset(all_z, 0, size_t(e.selection.entries * r) * sizeof(A));
  if (e.kept && e.selection.rows)
    for (int64_t n = 0; n < e.selection.entries; ++n)
      if (e.selection.rows[n] < 0) memset(row_at<T>(e.kept, n), 0, size_t(d) * sizeof(T));

  parallel_chunks(runs.count, grain_of(2 * longest * d * r), [&](int64_t first, int64_t last) {
    Scratch<vec<A>> sums(longest * r);
    Scratch<A> z(longest * r), used(longest * r);
    Scratch<T*> source(longest), out(longest);
    Scratch<const A*> terms(r);
    Chunk<A> buffer(longest);
    for (int64_t i = first; i < last; ++i) {
      const Run run = runs[i];
      const int64_t count = run.end - run.begin;
      for (int64_t m = 0; m < count; ++m) {
        int64_t entry = order.entry(run.begin + m), row = row_of(e.selection, entry);
        source[m] = row_at<T>(e.source, row);
        out[m] = row_at<T>(e.out, row);
        if (e.kept) memcpy(row_at<T>(e.kept, entry), source[m], size_t(d) * sizeof(T));
      }
      if (panels.reads) {
        project_tile<T, A>(source, count, panels.read, run.set, d, r, buffer, sums, z);
      } else {
        for (int64_t k = 0; k < count * r; ++k) z[k] = A(0);
      }
      if (panels.projects) project_tile<T, A>(source, count, panels.write, run.set, d, r, buffer, sums, used);
      for (int64_t m = 0; m < count; ++m) {
        int64_t entry = order.entry(run.begin + m);
        for (int64_t k = 0; k < r; ++k) {
          A before = z[m * r + k] + (panels.read_bias ? panels.read_bias[run.set * r + k] : A(0));
          A u = activate(before, w.activation);
          if (panels.projects) u -= used[m * r + k];
          if (panels.subtract_bias) u -= panels.subtract_bias[run.set * r + k];
          if (all_u) all_u[entry * r + k] = u;
          if (all_z) all_z[entry * r + k] = before;
          used[m * r + k] = u;
        }
        if (w.coeff) {
          A scale[256];
          convert(w.coeff, entry * r, r, scale);
          for (int64_t k = 0; k < r; ++k) used[m * r + k] *= scale[k];
        }
      }
      for (int64_t k = 0; k < r; ++k) terms[k] = panels.write.row(run.set * r + k);
      for (int64_t from = 0; from < d; from += kChunk<A>)
        update_chunk<T, A>(out, source, count, from, chunk_length<A>(d, from), buffer, {used, r, 1}, r, terms);
    }
  });
}

// Partial sums of the weights' gradients over one run of entries.
template <class A>
struct Partial {
  A *read, *write, *read_bias, *subtract_bias;
};

template <class T>
class EditBackwardKernel {
  using A = acc_t<T>;
  static constexpr int L = kLanes<A>;

 public:
  explicit EditBackwardKernel(const EditBackward& e)
      : e_(e), w_(e.weights), d_(w_.d), r_(w_.r), tile_(tile_rows<T>(d_, r_)), panels_(w_, e.selection.sets),
        order_(e.selection), runs_(order_, e.selection.sets, run_length()), weights_(e.grad_write != nullptr),
        stride_(padded<A>(d_) + kSkew<A>), terms_((panels_.reads + panels_.projects) * r_),
        partials_(weights_ ? runs_.count * partial_size() : 0) {}

  void operator()() const {
    if (e_.grad_coeff) memset(e_.grad_coeff, 0, size_t(e_.selection.entries * r_) * sizeof(A));  // skipped entries
    parallel_chunks(runs_.count, grain_of(4 * run_length() * d_ * r_), [&](int64_t first, int64_t last) {
      Buffers b(tile_, r_);
      for (int64_t i = first; i < last; ++i) run(i, b);
    });
    if (weights_) sum_partials();
  }

 private:
  struct Buffers {
    explicit Buffers(int64_t tile, int64_t r)
        : sums(tile * r), delta(tile * r), pulled(tile * 2 * r), used(tile * r), unused(tile * r), g(tile), x(tile), out(tile),
          terms(2 * r), sums_out(r), g_chunk(tile), x_chunk(tile) {}
    Scratch<vec<A>> sums;
    Scratch<A> delta;         // B g
    Scratch<A> pulled;        // [rows, terms_]: what multiplies the rows of `terms` in dh: dz, then -ddelta, where they are
    Scratch<A> used, unused;  // coeff * u, and its negative
    Scratch<T*> g, x, out;
    Scratch<const A*> terms;  // the rows of read, then of write
    Scratch<A*> sums_out;
    Chunk<A> g_chunk, x_chunk;
  };

  // Long enough that a run's partial sums cost little beside its rows; a function of the shapes alone.
  int64_t run_length() const {
    int64_t rows = 8 * r_ > 128 ? 8 * r_ : 128, most = (e_.selection.entries + 63) / 64;
    return rows > most ? rows : most;
  }
  int64_t partial_size() const { return (panels_.reads ? 2 : 1) * r_ * stride_ + 2 * padded<A>(r_); }
  Partial<A> partial(int64_t i) const {
    A* at = partials_ + i * partial_size();
    A* biases = at + (panels_.reads ? 2 : 1) * r_ * stride_;
    return {at + r_ * stride_, at, biases, biases + padded<A>(r_)};
  }

  void run(int64_t i, Buffers& b) const {
    const Run run = runs_[i];
    Partial<A> sums{};
    if (weights_) {
      sums = partial(i);
      memset(sums.write, 0, size_t(partial_size()) * sizeof(A));
    }
    for (int64_t begin = run.begin; begin < run.end; begin += tile_)
      tile(run.set, begin, smaller(begin + tile_, run.end), sums, b);
  }

  void tile(int64_t set, int64_t begin, int64_t end, const Partial<A>& sums, Buffers& b) const {
    const int64_t count = end - begin;
    const bool all_rows = e_.selection.rows == nullptr;
    for (int64_t m = 0; m < count; ++m) {
      int64_t entry = order_.entry(begin + m), row = row_of(e_.selection, entry);
      b.g[m] = row_at<T>(e_.grad, row);
      if (e_.out) b.out[m] = row_at<T>(e_.out, row);
      if (weights_) b.x[m] = row_at<T>(e_.kept, all_rows ? row : entry);
    }
    for (int64_t k = 0; k < r_ && panels_.reads; ++k) b.terms[k] = panels_.read.row(set * r_ + k);
    for (int64_t k = 0; k < r_; ++k) b.terms[panels_.reads * r_ + k] = panels_.write.row(set * r_ + k);
    project_tile<T, A>(b.g, count, panels_.write, set, d_, r_, b.g_chunk, b.sums, b.delta);
    ranks(begin, count, sums, b);
    for (int64_t from = 0; from < d_; from += kChunk<A>) {
      const int64_t length = chunk_length<A>(d_, from);
      if (weights_) weight_gradients(count, from, length, all_rows, sums, b);  // before the gradient is overwritten
      if (e_.out) hidden_gradient(count, from, length, b);
    }
  }

  // Everything of size [rows, r].
  void ranks(int64_t begin, int64_t count, const Partial<A>& sums, Buffers& b) const {
    const A* all_u = static_cast<const A*>(e_.u);
    const A* all_z = static_cast<const A*>(e_.z);
    for (int64_t m = 0; m < count; ++m) {
      const int64_t entry = order_.entry(begin + m);
      A scale[256];
      if (w_.coeff) convert(w_.coeff, entry * r_, r_, scale);
      for (int64_t k = 0; k < r_; ++k) {
        const int64_t at = m * r_ + k;
        const A u = weights_ || w_.coeff ? all_u[entry * r_ + k] : A(0), factor = w_.coeff ? scale[k] : A(1);
        const A ddelta = factor * b.delta[at];
        const A dz = w_.activation == Activation::linear
                         ? ddelta
                         : ddelta * activation_derivative(all_z[entry * r_ + k], w_.activation);
        if (e_.grad_coeff) static_cast<A*>(e_.grad_coeff)[entry * r_ + k] = u * b.delta[at];
        if (panels_.reads) b.pulled[m * terms_ + k] = dz;
        if (panels_.projects) b.pulled[m * terms_ + panels_.reads * r_ + k] = -ddelta;
        b.used[at] = factor * u;
        b.unused[at] = -factor * u;
        if (weights_) {
          sums.read_bias[k] += dz;
          sums.subtract_bias[k] -= ddelta;
        }
      }
    }
  }

  // used^T g, -ddelta^T x and dz^T x for one chunk of the channels, onto the partial sums.
  void weight_gradients(int64_t count, int64_t from, int64_t length, bool all_rows, const Partial<A>& sums, Buffers& b) const {
    const int64_t vectors = padded<A>(length) / L;
    outer({b.used, 1, r_}, count, from, vectors, rows_of(b.g, count, from, length, b.g_chunk), sums.write, b);
    if (terms_ == 0) return;  // no other gradient needs the input
    At<const A> x{b.x_chunk.rows(), 0};
    if (all_rows) {  // x = y - B^T used
      const A* const* write = b.terms + panels_.reads * r_;
      if (whole<A>(length)) {
        update<A, A, T>({b.x_chunk.rows(), 0}, {b.x, from}, count, vectors, {b.unused, r_, 1}, r_, {write, from});
      } else {
        b.x_chunk.load(b.x.get(), count, from, length);
        update<A, A, A>({b.x_chunk.rows(), 0}, x, count, vectors, {b.unused, r_, 1}, r_, {write, from});
      }
    } else {
      x = rows_of(b.x, count, from, length, b.x_chunk);
    }
    if (panels_.projects) outer({b.pulled + panels_.reads * r_, 1, terms_}, count, from, vectors, x, sums.write, b);
    if (panels_.reads) outer({b.pulled, 1, terms_}, count, from, vectors, x, sums.read, b);
  }

  // Rows of T as A: where they lie, or converted, for they are multiplied by every block of ranks.
  At<const A> rows_of(T* const* rows, int64_t count, int64_t from, int64_t length, const Chunk<A>& buffer) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (whole<A>(length)) return {rows, from};
    }
    buffer.load(rows, count, from, length);
    return {buffer.rows(), 0};
  }

  // sums[k, from + i] += sum_m S[k, m] x[m, i]
  void outer(Coefficients<A> s, int64_t count, int64_t from, int64_t vectors, At<const A> x, A* sums, Buffers& b) const {
    for (int64_t k = 0; k < r_; ++k) b.sums_out[k] = sums + k * stride_;
    update<A, A, A>({b.sums_out, from}, {b.sums_out, from}, r_, vectors, s, count, x);
  }

  // dh = g + A^T dz - B^T ddelta for one chunk of the channels.
  void hidden_gradient(int64_t count, int64_t from, int64_t length, Buffers& b) const {
    if (terms_) {
      update_chunk<T, A>(b.out, b.g, count, from, length, b.g_chunk, {b.pulled, terms_, 1}, terms_, b.terms);
      return;
    }
    for (int64_t m = 0; m < count; ++m)
      if (b.out[m] != b.g[m]) memcpy(b.out[m] + from, b.g[m] + from, size_t(length) * sizeof(T));
  }

  // Partial sums of each set in the order of its runs.
  void sum_partials() const {
    const int64_t sets = e_.selection.sets;
    const bool same = panels_.folded && panels_.reads;  // then dB takes dA with it: dB = used^T g - dA
    A* const grad_read = static_cast<A*>(e_.grad_read);
    A* const grad_write = static_cast<A*>(e_.grad_write);
    A* const read_bias = static_cast<A*>(e_.grad_read_bias);
    A* const subtract_bias = static_cast<A*>(e_.grad_subtract_bias);
    parallel_chunks(sets * r_, grain_of(runs_.count * d_), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t set = i / r_, k = i % r_;
        A *write = grad_write + i * d_, *read = panels_.reads ? grad_read + i * d_ : nullptr;
        memset(write, 0, size_t(d_) * sizeof(A));
        if (read) memset(read, 0, size_t(d_) * sizeof(A));
        A dc = A(0), dp = A(0);
        for (int64_t run = 0; run < runs_.count; ++run) {
          if (runs_[run].set != set) continue;
          const Partial<A> sums = partial(run);
          add(write, sums.write + k * stride_, A(1));
          if (read) add(read, sums.read + k * stride_, A(1));
          dc += sums.read_bias[k];
          dp += sums.subtract_bias[k];
        }
        if (same) add(write, read, A(-1));
        if (read_bias) read_bias[i] = dc;
        if (subtract_bias) subtract_bias[i] = dp;
      }
    });
  }
  void add(A* to, const A* from, A sign) const {
    int64_t j = 0;
    for (; j + L <= d_; j += L) store(to + j, fma(broadcast<A>(sign), load(from + j), load(to + j)));
    for (; j < d_; ++j) to[j] += sign * from[j];
  }

  const EditBackward& e_;
  const EditWeights& w_;
  const int64_t d_, r_, tile_;
  const Panels<A> panels_;
  const Order order_;
  const Runs runs_;
  const bool weights_;
  const int64_t stride_, terms_;
  const Scratch<A> partials_;
};

template <class T>
inline void edit_backward(const EditBackward& e) {
  EditBackwardKernel<T>{e}();
}

}  // namespace REFT_ISA
}  // namespace reft
