// Householder and Cayley maps R = (E N + V M)^T of X [d, r] and their gradients, defined in
// reft_kernels/orthonormal.py. Both directions make two passes over the tall matrices, with fp64 r
// x r algebra between:
//
//   forward   reduce: V^T V (and V0^T V)
//             solve:  M, N, back
//             write:  R = N^T E^T + M^T V^T (- back^T V0^T + point)
//   backward  reduce: total V (and total V0)
//             solve:  M, Gsym, H
//             write:  grad_X^T = M total + Gsym V^T (- M H V0^T)
//
// Sums are computed per chunk of rows and added in chunk order, so results do not depend on the
// number of threads.
#pragma once

#include "gram.h"
#include "orthonormal.h"
#include "parallel.h"
#include "small_linalg.h"
#include "tall_skinny.h"
#include "tiles.h"
#include "vector.h"

namespace reft {
namespace REFT_ISA {

enum class Map { householder, cayley };

// Factor of the map at X = 0: F(0) = map_at_zero(map) * E.
REFT_INLINE double map_at_zero(Map map) { return map == Map::householder ? -1.0 : 1.0; }

// Scale of one column of F.
template <class T>
double column_scale(const T* signs, bool base, Map map, int64_t column) {
  if (signs == nullptr) return 1.0;
  return base ? map_at_zero(map) * double(signs[column]) : double(signs[column]);
}

// ---- forward

template <class T>
struct ForwardSink {
  T *R, *D;  // all pointers start at the first row of the tile
  const T *point, *W;
  int64_t d, columns;

  REFT_INLINE void operator()(int64_t k, int64_t n, vec<T> v) const {
    const int64_t at = k * d + n, left = columns - n;
    if (left >= kLanes<T>) {
      if (point != nullptr) v += load(point + at);
      store(R + at, v);
      if (W != nullptr) store(D + at, load(W + at) - v);
    } else {
      if (point != nullptr) v += load_part(point + at, int(left));
      store_part(R + at, v, int(left));
      if (W != nullptr) store_part(D + at, load_part(W + at, int(left)) - v, int(left));
    }
  }
};

template <class T>
class ForwardBuild {
 public:
  static constexpr int64_t kSquares = 9;

  ForwardBuild(const BuildForward<T>& arguments, Map map)
      : f_(arguments),
        map_(map),
        tall_(arguments.base != nullptr ? 2 : 1),
        unit_ld_(round_up(arguments.r, kFactorVectors * kLanes<T>)),
        store_(RowCut<T>(arguments.d, arguments.r), arguments.layers, tall_,
               arguments.r * (tall_ * round_up(arguments.r, kGramColumns) + unit_ld_)) {}

  const RowCut<T>& cut() const { return store_.cut; }
  int64_t layers() const { return f_.layers; }
  int64_t tiles() const { return tall_; }
  int64_t products() const { return tall_; }

  void reduce(int64_t layer, int64_t chunk, const TileMemory<T>& tiles) const {
    const RowCut<T>& cut = store_.cut;
    store_.clear_sums(layer, chunk);
    for (int64_t row = chunk * cut.chunk; row < cut.end(chunk); row += cut.tile) {
      const int64_t count = smaller(cut.tile, cut.end(chunk) - row),
                    columns = round_up(count, kLanes<T>);
      load_tall(X(layer), cut, row, count, Top::blank, tiles[0]);
      add_gram(tiles[0], tiles[0], cut.padded_r, cut.ld, columns, true,
               store_.sums(layer, chunk, 0));
      if (f_.base == nullptr) continue;
      load_tall(base(layer), cut, row, count, Top::blank, tiles[1]);
      add_gram(tiles[1], tiles[0], cut.padded_r, cut.ld, columns, false,
               store_.sums(layer, chunk, 1));
    }
  }

  void solve(int64_t layer, double* memory, int64_t* order) const {
    const int64_t r = f_.r;
    Squares squares(memory, r);
    // The unit diagonal in the first r rows is large compared with the other elements, so the
    // products of these rows are computed in fp64.
    Square gram = squares.next_zero(), M = squares.next(), N = squares.next_zero(),
           inner = squares.next();
    Square V1 = squares.next(), V1_upper = squares.next();
    if (map_ == Map::householder) {
      read_top(X(layer), r, V1_upper, &V1);
      multiply(1.0, plain(V1_upper, Form::upper), V1, gram);
    }
    store_.add_sums(layer, 0, gram);
    if (map_ == Map::householder) {
      for (int64_t i = 0; i < r; ++i) gram[i][i] *= 0.5;
      invert_upper(gram, inner);
      multiply(-1.0, plain(inner, Form::upper), V1_upper, M);
      for (int64_t i = 0; i < r; ++i) N[i][i] = 1.0;
    } else {
      const T* x = X(layer);
      for (int64_t i = 0; i < r; ++i) {
        for (int64_t j = 0; j < i; ++j) {
          const double s = double(x[i * r + j]);
          inner[i][j] = gram[j][i] + s;
          inner[j][i] = gram[j][i] - s;
        }
        inner[i][i] = gram[i][i] + 1.0;
      }
      invert(inner, order);
      for (int64_t i = 0; i < r; ++i) {
        for (int64_t j = 0; j < r; ++j) {
          M[i][j] = -2.0 * inner[i][j];
          N[i][j] = 2.0 * inner[i][j];
        }
        N[i][i] -= 1.0;
      }
    }
    if (f_.base != nullptr)
      for (int64_t i = 0; i < r; ++i) N[i][i] -= map_at_zero(map_);
    const T* signs = f_.signs != nullptr ? f_.signs + layer * r : nullptr;
    for (int64_t k = 0; k < r; ++k) {
      const double scale = column_scale(signs, f_.base != nullptr, map_, k);
      for (int64_t i = 0; i < r; ++i) {
        M[i][k] *= scale;
        N[i][k] *= scale;
      }
    }

    T* factors = store_.factors(layer);
    T* aux = f_.aux + layer * tall_ * r * r;
    write_square(inner, aux);
    PackedFactor<T> factor(factors, store_.cut, tall_);
    factor.fill(0, 1.0, transposed(M));
    // The contributions of E and of the unit diagonals of V and V0 nearly cancel, so they are
    // summed here in fp64 and excluded from the tiles.
    Square top = N;
    if (f_.base != nullptr) {
      Square V0_upper = squares.next(), cross = squares.next_zero(), projected = squares.next();
      Square T0 = gram, back = inner;  // gram and inner are no longer needed
      read_top(base(layer), r, V0_upper);
      if (map_ == Map::householder) multiply(1.0, plain(V0_upper, Form::upper), V1, cross);
      store_.add_sums(layer, 1, cross);
      write_square(cross, aux + r * r);
      multiply(1.0, plain(cross), M, projected);
      multiply(1.0, plain(V0_upper, Form::upper), N, projected, true);
      read_upper(base(layer), T0);
      multiply(1.0, plain(T0, Form::upper), projected, back);
      factor.fill(1, -1.0, transposed(back));
      for (int64_t i = 0; i < r; ++i)
        for (int64_t k = 0; k < r; ++k) top[i][k] -= back[i][k];
    }
    T* unit = factors + factor_count();
    for (int64_t k = 0; k < r; ++k) {
      for (int64_t i = 0; i < r; ++i)
        unit[k * unit_ld_ + i] = T(map_ == Map::householder ? top[i][k] + M[i][k] : top[i][k]);
      for (int64_t i = r; i < unit_ld_; ++i) unit[k * unit_ld_ + i] = 0;
    }
  }

  void write(int64_t layer, int64_t chunk, const TileMemory<T>& tiles) const {
    const RowCut<T>& cut = store_.cut;
    const T *factor = store_.factors(layer), *unit = factor + factor_count();
    const int64_t all = layer * f_.r * f_.d;
    for (int64_t row = chunk * cut.chunk; row < cut.end(chunk); row += cut.tile) {
      const int64_t count = smaller(cut.tile, cut.end(chunk) - row), at = all + row;
      load_tall(X(layer), cut, row, count,
                map_ == Map::householder ? Top::strictly_lower : Top::blank, tiles[0]);
      if (f_.base != nullptr)
        load_tall(base(layer), cut, row, count, Top::strictly_lower, tiles[1]);
      ForwardSink<T> sink{f_.R + at,
                          f_.W != nullptr ? f_.D + at : nullptr,
                          f_.base != nullptr ? f_.base_point + at : nullptr,
                          f_.W != nullptr ? f_.W + at : nullptr,
                          f_.d,
                          count};
      Addend<T> addend{row < unit_ld_ ? unit + row : nullptr, unit_ld_, unit_ld_ - row};
      multiply_tile(factor, f_.r, tall_ * cut.padded_r, tiles[0], cut.ld,
                    round_up(count, kLanes<T>), addend, sink);
    }
  }

 private:
  const T* X(int64_t layer) const { return f_.X + layer * f_.d * f_.r; }
  const T* base(int64_t layer) const { return f_.base + layer * f_.d * f_.r; }
  int64_t factor_count() const { return f_.r * tall_ * store_.cut.padded_r; }

  const BuildForward<T>& f_;
  Map map_;
  // tall_: number of tall matrices. unit_ld_: row stride of the fp64-summed terms of the first r
  // rows.
  int64_t tall_, unit_ld_;
  LayerStore<T> store_;
};

// ---- backward

template <class T>
struct TileSink {
  T* out;
  int64_t ld;
  REFT_INLINE void operator()(int64_t i, int64_t n, vec<T> v) const { store(out + i * ld + n, v); }
};

template <class T>
class BackwardBuild {
 public:
  static constexpr int64_t kSquares = 10;

  BackwardBuild(const BuildBackward<T>& arguments, Map map)
      : f_(arguments),
        map_(map),
        tall_(arguments.base != nullptr ? 2 : 1),
        store_(RowCut<T>(arguments.d, arguments.r), arguments.layers, tall_,
               arguments.r * ((1 + tall_) * round_up(arguments.r, kGramColumns) + arguments.r)) {}

  const RowCut<T>& cut() const { return store_.cut; }
  int64_t layers() const { return f_.layers; }
  int64_t tiles() const { return tall_ + 2; }  // total, V and V0 as one operand, then the result
  int64_t products() const { return tall_ + 1; }

  void reduce(int64_t layer, int64_t chunk, const TileMemory<T>& tiles) const {
    const RowCut<T>& cut = store_.cut;
    store_.clear_sums(layer, chunk);
    for (int64_t row = chunk * cut.chunk; row < cut.end(chunk); row += cut.tile) {
      const int64_t count = smaller(cut.tile, cut.end(chunk) - row),
                    columns = round_up(count, kLanes<T>);
      load_total(layer, row, count, tiles[0]);
      load_tall(X(layer), cut, row, count, map_ == Map::householder ? Top::unit_lower : Top::blank,
                tiles[1]);
      add_gram(tiles[0], tiles[1], cut.padded_r, cut.ld, columns, false,
               store_.sums(layer, chunk, 0));
      if (f_.base == nullptr) continue;
      load_tall(base(layer), cut, row, count, Top::unit_lower, tiles[2]);
      add_gram(tiles[0], tiles[2], cut.padded_r, cut.ld, columns, false,
               store_.sums(layer, chunk, 1));
    }
  }

  // Names with suffix _t are transposes of the gradients in orthonormal.py.
  void solve(int64_t layer, double* memory, int64_t*) const {
    const int64_t r = f_.r;
    Squares squares(memory, r);
    Square M = squares.next(), inner = squares.next(), Gsym = squares.next(),
           top_t = squares.next();
    Square Mbar_t = squares.next_zero(), Nbar_t = squares.next(), H = squares.next();
    Square one = squares.next(), two = squares.next();
    const T* aux = f_.aux + layer * tall_ * r * r;
    read_square(aux, inner);
    store_.add_sums(layer, 0, Mbar_t);
    for (int64_t k = 0; k < r; ++k)
      for (int64_t i = 0; i < r; ++i) Nbar_t[k][i] = double(total(layer, k, i));
    if (f_.base != nullptr) {  // total - H V0^T replaces total
      Square T0 = one, cross = one, V0_upper = one, sums = two;
      memset(sums.data, 0, size_t(square_count(r)) * sizeof(double));
      store_.add_sums(layer, 1, sums);
      read_upper(base(layer), T0);
      multiply(1.0, plain(sums), T0, H);
      read_square(aux + r * r, cross);
      multiply(-1.0, plain(H), cross, Mbar_t, true);
      read_top(base(layer), r, V0_upper);
      multiply(-1.0, plain(H), V0_upper, Nbar_t, true);
    }
    const T* signs = f_.signs != nullptr ? f_.signs + layer * r : nullptr;
    for (int64_t k = 0; k < r; ++k) {
      const double scale = column_scale(signs, f_.base != nullptr, map_, k);
      for (int64_t i = 0; i < r; ++i) {
        Mbar_t[k][i] *= scale;
        Nbar_t[k][i] *= scale;
      }
    }

    Square minus_top = two;  // the gradient of the first r rows is top_t^T - minus_top
    if (map_ == Map::householder) {
      Square V1_upper = squares.next();
      read_top(X(layer), r, V1_upper);
      multiply(-1.0, plain(inner, Form::upper), V1_upper, M);
      multiply(1.0, plain(V1_upper, Form::upper), Mbar_t, one);
      multiply(1.0, plain(inner, Form::upper), one, two);
      Square Sbar_t = one;
      multiply(1.0, plain(two), inner, Sbar_t);
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j <= i; ++j) Gsym[i][j] = Gsym[j][i] = Sbar_t[i][j];
      multiply(1.0, plain(M, Form::upper), Nbar_t, top_t);
      multiply(1.0, plain(Gsym), V1_upper, top_t, true);
      multiply(1.0, plain(Mbar_t), inner, minus_top);
    } else {
      Square Ybar_t = one, Pbar_t = top_t;
      minus_top = Pbar_t;
      for (int64_t k = 0; k < r; ++k)
        for (int64_t i = 0; i < r; ++i) Ybar_t[k][i] = 2.0 * (Nbar_t[k][i] - Mbar_t[k][i]);
      multiply(1.0, plain(inner), Ybar_t, two);
      multiply(-1.0, plain(two), inner, Pbar_t);
      for (int64_t i = 0; i < r; ++i) {
        for (int64_t j = 0; j < r; ++j) {
          Gsym[i][j] = Pbar_t[i][j] + Pbar_t[j][i];
          M[i][j] = -2.0 * inner[i][j];
        }
      }
    }
    for (int64_t k = 0; k < r; ++k) {
      const double scale = column_scale(signs, f_.base != nullptr, map_, k);
      for (int64_t i = 0; i < r; ++i) M[i][k] *= scale;
    }

    T* factors = store_.factors(layer);
    PackedFactor<T> factor(factors, store_.cut, 1 + tall_);
    factor.fill(0, 1.0, plain(M));
    factor.fill(1, 1.0, plain(Gsym));
    if (f_.base != nullptr) {
      multiply(-1.0, plain(M), H, one);
      factor.fill(2, 1.0, plain(one));
    }
    T* top = factors + factor_count();
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j)
        top[i * r + j] = j < i ? T(top_t[j][i] - minus_top[i][j]) : T(0);
  }

  void write(int64_t layer, int64_t chunk, const TileMemory<T>& tiles) const {
    const RowCut<T>& cut = store_.cut;
    const T *factor = store_.factors(layer), *top = factor + factor_count();
    T *grad = f_.grad_X + layer * f_.d * f_.r, *result = tiles[1 + tall_];
    for (int64_t row = chunk * cut.chunk; row < cut.end(chunk); row += cut.tile) {
      const int64_t count = smaller(cut.tile, cut.end(chunk) - row);
      load_total(layer, row, count, tiles[0]);
      load_tall(X(layer), cut, row, count, tiles[1]);
      if (f_.base != nullptr) load_tall(base(layer), cut, row, count, tiles[2]);
      multiply_tile(factor, f_.r, (1 + tall_) * cut.padded_r, tiles[0], cut.ld,
                    round_up(count, kLanes<T>), Addend<T>{nullptr, 0, 0},
                    TileSink<T>{result, cut.ld});
      store_transposed(result, cut.ld, count, f_.r, grad + row * f_.r);
      const int64_t top_count = smaller(row + count, f_.r) - row;
      if (top_count > 0)
        memcpy(grad + row * f_.r, top + row * f_.r, size_t(top_count * f_.r) * sizeof(T));
    }
  }

 private:
  const T* X(int64_t layer) const { return f_.X + layer * f_.d * f_.r; }
  const T* base(int64_t layer) const { return f_.base + layer * f_.d * f_.r; }
  int64_t factor_count() const { return f_.r * (1 + tall_) * store_.cut.padded_r; }

  // Element of dL/dR = grad_R - grad_D.
  T total(int64_t layer, int64_t k, int64_t n) const {
    const int64_t at = (layer * f_.r + k) * f_.d + n;
    return (f_.grad_R != nullptr ? f_.grad_R[at] : T(0)) -
           (f_.grad_D != nullptr ? f_.grad_D[at] : T(0));
  }
  void load_total(int64_t layer, int64_t first_row, int64_t count, T* tile) const {
    constexpr int L = kLanes<T>;
    for (int64_t k = 0; k < f_.r; ++k) {
      const int64_t at = (layer * f_.r + k) * f_.d + first_row;
      const T* R = f_.grad_R != nullptr ? f_.grad_R + at : nullptr;
      const T* D = f_.grad_D != nullptr ? f_.grad_D + at : nullptr;
      T* line = tile + k * store_.cut.ld;
      int64_t n = 0;
      for (; n + L <= count; n += L) {
        const vec<T> plus = R != nullptr ? load(R + n) : vec<T>{};
        store(line + n, D != nullptr ? plus - load(D + n) : plus);
      }
      if (n < count) {
        const vec<T> plus = R != nullptr ? load_part(R + n, int(count - n)) : vec<T>{};
        store(line + n, D != nullptr ? plus - load_part(D + n, int(count - n)) : plus);
      }
    }
  }

  const BuildBackward<T>& f_;
  Map map_;
  int64_t tall_;
  LayerStore<T> store_;
};

// ---- forward and backward

// Runs reduce, solve and write for all layers, in parallel if there is enough work.
template <class T, class Build>
void run(const Build& build) {
  // About 10 us at r = 8; less work is not worth entering the thread pool.
  constexpr int64_t kThreadWork = 1 << 20;
  // With enough layers for all threads, a layer that fits in L2 is processed by one thread.
  constexpr int64_t kLayerBytes = 512 * 1024;
  constexpr int64_t kLayersForThreads = 8;
  const RowCut<T>& cut = build.cut();
  const int64_t r = cut.r, layers = build.layers(), chunks = cut.chunks;
  const int64_t chunk_work = smaller(cut.chunk, cut.d) * r * (build.products() * r + 16),
                solve_work = 4 * r * r * r;
  auto grain = [](int64_t work) { return kThreadWork / work + 1; };

  if (layers >= kLayersForThreads && cut.d * r * int64_t(sizeof(T)) <= kLayerBytes) {
    parallel_chunks(layers, grain(2 * chunks * chunk_work + solve_work),
                    [&](int64_t begin, int64_t end) {
                      TileMemory<T> tiles(cut, build.tiles());
                      Scratch<double> squares(Build::kSquares * square_count(r));
                      Scratch<int64_t> order(r);
                      for (int64_t layer = begin; layer < end; ++layer) {
                        for (int64_t chunk = 0; chunk < chunks; ++chunk)
                          build.reduce(layer, chunk, tiles);
                        build.solve(layer, squares, order);
                        for (int64_t chunk = 0; chunk < chunks; ++chunk)
                          build.write(layer, chunk, tiles);
                      }
                    });
    return;
  }
  parallel_chunks(layers * chunks, grain(chunk_work), [&](int64_t begin, int64_t end) {
    TileMemory<T> tiles(cut, build.tiles());
    for (int64_t i = begin; i < end; ++i) build.reduce(i / chunks, i % chunks, tiles);
  });
  parallel_chunks(layers, grain(solve_work), [&](int64_t begin, int64_t end) {
    Scratch<double> squares(Build::kSquares * square_count(r));
    Scratch<int64_t> order(r);
    for (int64_t layer = begin; layer < end; ++layer) build.solve(layer, squares, order);
  });
  parallel_chunks(layers * chunks, grain(chunk_work), [&](int64_t begin, int64_t end) {
    TileMemory<T> tiles(cut, build.tiles());
    for (int64_t i = begin; i < end; ++i) build.write(i / chunks, i % chunks, tiles);
  });
}

template <class T>
void build_forward(const BuildForward<T>& arguments, Map map) {
  run<T>(ForwardBuild<T>(arguments, map));
}

template <class T>
void build_backward(const BuildBackward<T>& arguments, Map map) {
  if (arguments.layers == 0) return;  // grad_X is empty
  if (arguments.grad_R == nullptr && arguments.grad_D == nullptr) {
    memset(arguments.grad_X, 0, size_t(arguments.layers * arguments.d * arguments.r) * sizeof(T));
    return;
  }
  run<T>(BackwardBuild<T>(arguments, map));
}

template <class T>
void householder(const BuildForward<T>& arguments) {
  build_forward(arguments, Map::householder);
}
template <class T>
void householder_backward(const BuildBackward<T>& arguments) {
  build_backward(arguments, Map::householder);
}
template <class T>
void cayley(const BuildForward<T>& arguments) {
  build_forward(arguments, Map::cayley);
}
template <class T>
void cayley_backward(const BuildBackward<T>& arguments) {
  build_backward(arguments, Map::cayley);
}

}  // namespace REFT_ISA
}  // namespace reft
