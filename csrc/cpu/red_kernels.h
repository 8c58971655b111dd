// RED: y = scale * x + bias over the channels of the selected rows; forward and backward.
#pragma once

#include "tiles.h"

namespace reft {
namespace REFT_ISA {

// out[i] = f(i, a[i]) over a row of d elements, with a partial vector at the end. a and out may
// alias.
template <class T, class F>
REFT_INLINE void map_row(const T* a, T* out, int64_t d, bool streams, F f) {
  constexpr int L = kLanes<acc_t<T>>;
  int64_t i = 0;
  if (streams)
    for (; i + L <= d; i += L) stream(out + i, f(i, load(a + i)));
  else
    for (; i + L <= d; i += L) store(out + i, f(i, load(a + i)));
  if (i < d) store_part(out + i, f(i, load_part(a + i, int(d - i))), int(d - i));
}

template <class T>
inline void red(const RedForward& e) {
  using A = acc_t<T>;
  const int64_t d = e.d;
  Panel<A> scale, bias;
  scale.fill(e.scale, e.selection.sets, d);
  bias.fill(e.bias, e.selection.sets, d);
  const Order order(e.selection);
  const Runs runs(order, e.selection.sets, 64);
  const bool streams = streams_out<T>(e.selection, e.source, e.out, d);
  if (e.saved_input && e.selection.rows)
    for (int64_t n = 0; n < e.selection.entries; ++n)
      if (e.selection.rows[n] < 0) memset(row_at<T>(e.saved_input, n), 0, size_t(d) * sizeof(T));
  parallel_chunks(runs.count, grain_of(64 * d), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const A *scale_row = scale.row(runs[i].set), *bias_row = bias.row(runs[i].set);
      for (int64_t n = runs[i].begin; n < runs[i].end; ++n) {
        int64_t entry = order.entry(n), row = row_of(e.selection, entry);
        const T* source = row_at<T>(e.source, row);
        if (e.saved_input) memcpy(row_at<T>(e.saved_input, entry), source, size_t(d) * sizeof(T));
        map_row(source, row_at<T>(e.out, row), d, streams, [&](int64_t c, vec<A> x) {
          return fma(load(scale_row + c), x, load(bias_row + c));
        });
      }
    }
    if (streams) end_streams();
  });
}

template <class T>
inline void red_backward(const RedBackward& e) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  constexpr int64_t kRun = 256;
  const int64_t d = e.d, stride = padded<A>(d), sets = e.selection.sets;
  const bool weights = e.grad_scale != nullptr,
             streams = streams_out<T>(e.selection, e.grad, e.out, d);
  Panel<A> scale;
  scale.fill(e.scale, sets, d);
  const Order order(e.selection);
  const Runs runs(order, sets,
                  (e.selection.entries + 63) / 64 > kRun ? (e.selection.entries + 63) / 64 : kRun);
  const Scratch<A> partials(weights ? runs.count * 2 * stride : 0);
  parallel_chunks(runs.count, grain_of(kRun * d), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const A* scale_row = scale.row(runs[i].set);
      A *sum_scale = nullptr, *sum_bias = nullptr;
      if (weights) {
        sum_scale = partials + i * 2 * stride;
        sum_bias = sum_scale + stride;
        memset(sum_scale, 0, size_t(2 * stride) * sizeof(A));
      }
      for (int64_t n = runs[i].begin; n < runs[i].end; ++n) {
        int64_t entry = order.entry(n), row = row_of(e.selection, entry);
        const T* grad = row_at<T>(e.grad, row);
        if (weights) {
          const T* x = row_at<T>(e.saved_input, e.selection.rows ? entry : row);
          for (int64_t c = 0; c < d; c += L) {
            bool whole = c + L <= d;
            vec<A> g = whole ? load(grad + c) : load_part(grad + c, int(d - c));
            vec<A> h = whole ? load(x + c) : load_part(x + c, int(d - c));
            store(sum_scale + c, fma(g, h, load(sum_scale + c)));
            store(sum_bias + c, load(sum_bias + c) + g);
          }
        }
        if (e.out)
          map_row(grad, row_at<T>(e.out, row), d, streams,
                  [&](int64_t c, vec<A> g) { return load(scale_row + c) * g; });
      }
    }
    if (streams) end_streams();
  });
  if (!weights) return;
  A* const grads[2] = {static_cast<A*>(e.grad_scale), static_cast<A*>(e.grad_bias)};
  for (int64_t set = 0; set < sets; ++set)
    for (int which = 0; which < 2; ++which) {
      A* to = grads[which] + set * d;
      memset(to, 0, size_t(d) * sizeof(A));
      for (int64_t i = 0; i < runs.count; ++i) {
        if (runs[i].set != set) continue;
        const A* from = partials + (2 * i + which) * stride;
        for (int64_t c = 0; c < d; ++c) to[c] += from[c];
      }
    }
}

}  // namespace REFT_ISA
}  // namespace reft
