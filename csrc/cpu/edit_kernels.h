// The edit y = x + B^T (coeff * u), u = act(A x + c) - (B x + p), forward and backward. Each makes
// one pass over the rows.
#pragma once

#include "paired_products.h"
#include "plain_products.h"

namespace reft {
namespace REFT_ISA {

template <class T, template <class> class Products>
inline void edit_by(const EditForward& e) {
  using A = acc_t<T>;
  using P = Products<T>;
  const EditWeights& w = e.weights;
  const int64_t d = w.d, r = w.r, sets = e.selection.sets, longest = tile_rows<T>(d, r);
  const P products(w, sets, longest, false);
  const bool streams = streams_out<T>(e.selection, e.source, e.out, d);
  const Order order(e.selection);
  const Runs runs(order, sets, longest);
  A* const all_u = static_cast<A*>(e.u);
  A* const all_z = static_cast<A*>(e.z);
  // u and z of skipped entries are zero
  if (all_u) memset(all_u, 0, size_t(e.selection.entries * r) * sizeof(A));
  if (all_z) memset(all_z, 0, size_t(e.selection.entries * r) * sizeof(A));
  if (e.saved_input && e.selection.rows)
    for (int64_t n = 0; n < e.selection.entries; ++n)
      if (e.selection.rows[n] < 0) memset(row_at<T>(e.saved_input, n), 0, size_t(d) * sizeof(T));

  parallel_chunks(runs.count, grain_of(2 * longest * d * r), [&](int64_t first, int64_t last) {
    typename P::Work work(products);
    typename P::ByTerm coefficients(products);
    Scratch<A> z(longest * r), scaled_u(longest * r);
    Scratch<T*> source(longest), out(longest);
    for (int64_t i = first; i < last; ++i) {
      const Run run = runs[i];
      const int64_t count = run.end - run.begin;
      for (int64_t m = 0; m < count; ++m) {
        int64_t entry = order.entry(run.begin + m), row = row_of(e.selection, entry);
        source[m] = row_at<T>(e.source, row);
        out[m] = row_at<T>(e.out, row);
        if (e.saved_input)
          memcpy(row_at<T>(e.saved_input, entry), source[m], size_t(d) * sizeof(T));
      }
      if (products.reads) {
        products.project(true, source, count, run.set, work, z);
      } else {
        for (int64_t k = 0; k < count * r; ++k) z[k] = A(0);
      }
      if (products.projects) products.project(false, source, count, run.set, work, scaled_u);
      for (int64_t m = 0; m < count; ++m) {
        int64_t entry = order.entry(run.begin + m);
        for (int64_t k = 0; k < r; ++k) {
          A preactivation =
              z[m * r + k] + (products.read_bias ? products.read_bias[run.set * r + k] : A(0));
          A u = activate(preactivation, w.activation);
          if (products.projects) u -= scaled_u[m * r + k];
          if (products.subtract_bias) u -= products.subtract_bias[run.set * r + k];
          if (all_u) all_u[entry * r + k] = u;
          if (all_z) all_z[entry * r + k] = preactivation;
          scaled_u[m * r + k] = u;
        }
        if (w.coeff) {
          A scale[256];
          convert(w.coeff, entry * r, r, scale);
          for (int64_t k = 0; k < r; ++k) scaled_u[m * r + k] *= scale[k];
        }
      }
      coefficients.fill(products, run.set, scaled_u, count, false, true);
      for (int64_t from = 0; from < d; from += kChunk<A>)
        products.add(out, source, count, from, smaller(d - from, kChunk<A>), coefficients, streams,
                     work);
    }
    if (streams) end_streams();
  });
}

// Partial sums of the gradients of weights over one run of entries.
template <class A>
struct Partial {
  A *read, *write, *read_bias, *subtract_bias;
};

template <class T, template <class> class Products>
class EditBackwardKernel {
  using A = acc_t<T>;
  using P = Products<T>;
  static constexpr int L = kLanes<A>;

 public:
  explicit EditBackwardKernel(const EditBackward& e)
      : e_(e),
        w_(e.weights),
        d_(w_.d),
        r_(w_.r),
        tile_(tile_rows<T>(d_, r_)),
        products_(w_, e.selection.sets, tile_, true),
        order_(e.selection),
        runs_(order_, e.selection.sets, run_length()),
        weights_(e.grad_write != nullptr),
        streams_(streams_out<T>(e.selection, e.grad, e.out, d_)),
        stride_(padded<A>(d_) + kSkew<A>),
        terms_(products_.terms()),
        partials_(weights_ ? runs_.count * partial_size() : 0) {}

  void operator()() const {
    // gradients of skipped entries are zero
    if (e_.grad_coeff) memset(e_.grad_coeff, 0, size_t(e_.selection.entries * r_) * sizeof(A));
    parallel_chunks(runs_.count, grain_of(4 * run_length() * d_ * r_),
                    [&](int64_t first, int64_t last) {
                      Buffers b(products_);
                      for (int64_t i = first; i < last; ++i) run(i, b);
                      if (streams_) end_streams();
                    });
    if (weights_) sum_partials();
  }

 private:
  struct Buffers {
    explicit Buffers(const P& p)
        : work(p),
          delta(p.tile * p.r),
          grad_terms(p.tile * 2 * p.r),
          scaled_u(p.tile * p.r),
          negative_scaled_u(p.tile * p.r),
          g(p.tile),
          x(p.tile),
          out(p.tile),
          hidden(p),
          input(p),
          used_rows(p),
          read_rows(p),
          write_rows(p) {}
    typename P::Work work;
    Scratch<A> delta;  // B g, [rows, r]
    // [rows, terms_], coefficients of the weights in dh: dz (with read), -ddelta (with projection).
    Scratch<A> grad_terms;
    Scratch<A> scaled_u, negative_scaled_u;  // coeff * u and -(coeff * u), [rows, r]
    Scratch<T*> g, x, out;
    // For dh = g + grad_terms * weights, and for x = y - B^T (coeff * u).
    typename P::ByTerm hidden, input;
    typename P::ByRow used_rows, read_rows, write_rows;
  };

  // Length of a run: long enough that its partial sums are cheap compared with its rows. Depends
  // only on the shapes.
  int64_t run_length() const {
    int64_t rows = 8 * r_ > 128 ? 8 * r_ : 128, most = (e_.selection.entries + 63) / 64;
    return rows > most ? rows : most;
  }
  int64_t partial_size() const {
    return (products_.reads ? 2 : 1) * r_ * stride_ + 2 * padded<A>(r_);
  }
  Partial<A> partial(int64_t i) const {
    A* at = partials_ + i * partial_size();
    A* biases = at + (products_.reads ? 2 : 1) * r_ * stride_;
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
      if (weights_) b.x[m] = row_at<T>(e_.saved_input, all_rows ? row : entry);
    }
    products_.project(false, b.g, count, set, b.work, b.delta);
    ranks(begin, count, sums, b);
    prepare(set, count, all_rows, b);
    for (int64_t from = 0; from < d_; from += kChunk<A>) {
      const int64_t length = smaller(d_ - from, kChunk<A>);
      // Before hidden_gradient, which may overwrite the gradient in place.
      if (weights_) weight_gradients(count, from, length, all_rows, sums, b);
      if (e_.out) hidden_gradient(count, from, length, b);
    }
  }

  // Prepares the coefficients of a tile's products.
  void prepare(int64_t set, int64_t count, bool all_rows, Buffers& b) const {
    if (e_.out && terms_)
      b.hidden.fill(products_, set, b.grad_terms, count, products_.reads, products_.projects);
    if (!weights_) return;
    b.used_rows.fill(products_, b.scaled_u, r_, count);
    if (products_.reads) b.read_rows.fill(products_, b.grad_terms, terms_, count);
    if (products_.projects)
      b.write_rows.fill(products_, b.grad_terms + products_.reads * r_, terms_, count);
    if (all_rows) b.input.fill(products_, set, b.negative_scaled_u, count, false, true);
  }

  // Computes all quantities of shape [rows, r].
  void ranks(int64_t begin, int64_t count, const Partial<A>& sums, Buffers& b) const {
    const A* all_u = static_cast<const A*>(e_.u);
    const A* all_z = static_cast<const A*>(e_.z);
    for (int64_t m = 0; m < count; ++m) {
      const int64_t entry = order_.entry(begin + m);
      A scale[256];
      if (w_.coeff) convert(w_.coeff, entry * r_, r_, scale);
      for (int64_t k = 0; k < r_; ++k) {
        const int64_t at = m * r_ + k;
        const A u = weights_ || w_.coeff ? all_u[entry * r_ + k] : A(0),
                factor = w_.coeff ? scale[k] : A(1);
        const A ddelta = factor * b.delta[at];
        const A dz = w_.activation == Activation::linear
                         ? ddelta
                         : ddelta * activation_derivative(all_z[entry * r_ + k], w_.activation);
        if (e_.grad_coeff) static_cast<A*>(e_.grad_coeff)[entry * r_ + k] = u * b.delta[at];
        if (products_.reads) b.grad_terms[m * terms_ + k] = dz;
        if (products_.projects) b.grad_terms[m * terms_ + products_.reads * r_ + k] = -ddelta;
        b.scaled_u[at] = factor * u;
        b.negative_scaled_u[at] = -factor * u;
        if (weights_) {
          sums.read_bias[k] += dz;
          sums.subtract_bias[k] -= ddelta;
        }
      }
    }
  }

  // Adds (coeff * u)^T g, -ddelta^T x and dz^T x for one chunk of channels to the partial sums.
  void weight_gradients(int64_t count, int64_t from, int64_t length, bool all_rows,
                        const Partial<A>& sums, Buffers& b) const {
    const auto g = products_.lines_of(b.g, count, from, length, b.work);
    products_.outer(b.used_rows, g, from, length, sums.write, stride_, b.work);
    if (terms_ == 0) return;  // the gradients below, which need the input, are absent
    const auto x = all_rows ? products_.rebuilt(b.x, count, from, length, b.input, b.work)
                            : products_.lines_of(b.x, count, from, length, b.work);
    if (products_.projects)
      products_.outer(b.write_rows, x, from, length, sums.write, stride_, b.work);
    if (products_.reads) products_.outer(b.read_rows, x, from, length, sums.read, stride_, b.work);
  }

  // dh = g + A^T dz - B^T ddelta for one chunk of channels.
  void hidden_gradient(int64_t count, int64_t from, int64_t length, Buffers& b) const {
    if (terms_) {
      products_.add(b.out, b.g, count, from, length, b.hidden, streams_, b.work);
      return;
    }
    for (int64_t m = 0; m < count; ++m)
      if (b.out[m] != b.g[m]) memcpy(b.out[m] + from, b.g[m] + from, size_t(length) * sizeof(T));
  }

  // Adds the partial sums of each set in the order of its runs.
  void sum_partials() const {
    const int64_t sets = e_.selection.sets;
    // Then the input terms of dB are -dA, so dB = (coeff * u)^T g - dA.
    const bool subtract_read = products_.folded && products_.reads;
    A* const grad_read = static_cast<A*>(e_.grad_read);
    A* const grad_write = static_cast<A*>(e_.grad_write);
    A* const read_bias = static_cast<A*>(e_.grad_read_bias);
    A* const subtract_bias = static_cast<A*>(e_.grad_subtract_bias);
    parallel_chunks(sets * r_, grain_of(runs_.count * d_), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t set = i / r_, k = i % r_;
        A *write = grad_write + i * d_, *read = products_.reads ? grad_read + i * d_ : nullptr;
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
        if (subtract_read) add(write, read, A(-1));
        if (read_bias) read_bias[i] = dc;
        if (subtract_bias) subtract_bias[i] = dp;
      }
    });
  }
  void add(A* to, const A* from, A sign) const {
    int64_t j = 0;
    for (; j + L <= d_; j += L)
      store(to + j, fma(broadcast<A>(sign), load(from + j), load(to + j)));
    for (; j < d_; ++j) to[j] += sign * from[j];
  }

  const EditBackward& e_;
  const EditWeights& w_;
  const int64_t d_, r_, tile_;
  const P products_;
  const Order order_;
  const Runs runs_;
  const bool weights_, streams_;
  const int64_t stride_, terms_;
  const Scratch<A> partials_;
};

template <class T>
inline void edit(const EditForward& e) {
  edit_by<T, PlainProducts>(e);
}
template <class T>
inline void edit_backward(const EditBackward& e) {
  EditBackwardKernel<T, PlainProducts>{e}();
}

#if defined(__AVX512BF16__)
// Whether to use bf16 pair products: not for small ranks, where fp32 weights are as fast, and not
// with relu, whose derivative changes if rounded weights change the sign of z.
inline bool use_pairs(const EditWeights& w) {
  return w.r >= kPairedRanks && w.activation != Activation::relu;
}

template <>
inline void edit<bf16>(const EditForward& e) {
  use_pairs(e.weights) ? edit_by<bf16, PairedProducts>(e) : edit_by<bf16, PlainProducts>(e);
}
template <>
inline void edit_backward<bf16>(const EditBackward& e) {
  use_pairs(e.weights) ? EditBackwardKernel<bf16, PairedProducts>{e}()
                       : EditBackwardKernel<bf16, PlainProducts>{e}();
}
#endif

}  // namespace REFT_ISA
}  // namespace reft
