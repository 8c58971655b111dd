// Runs every host function of csrc/cuda with small shapes under a sanitizer, without PyTorch.
//
//     sanitized [--once] [PART-OF-A-CASE-NAME]...
//
// A case runs with several thread orders and with different initial bytes in shared memory. Its
// outputs must be finite, fully written and bit-identical each time. With --once it runs in one
// order.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "arguments.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "machine.h"

namespace {

using namespace reft_cuda;

std::minstd_rand generator(1);
int failures = 0;
bool once = false;

float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(generator);
}

size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Elements in an allocation of exactly their size, so that AddressSanitizer detects overruns.
class Buffer {
 public:
  Buffer(Dtype dtype, size_t count)
      : dtype_(dtype), bytes_(count * size_of(dtype)), data_(count ? malloc(bytes_) : nullptr) {
    poison();
  }
  Buffer(const Buffer& other)
      : dtype_(other.dtype_), bytes_(other.bytes_), data_(bytes_ ? malloc(bytes_) : nullptr) {
    if (bytes_ != 0) memcpy(data_, other.data_, bytes_);
  }
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  // unwritten elements are NaN in every dtype
  void poison() {
    if (bytes_ != 0) memset(data_, 0xff, bytes_);
  }
  void put(size_t at, float value) {
    if (dtype_ == Dtype::kFloat32)
      static_cast<float*>(data_)[at] = value;
    else if (dtype_ == Dtype::kBFloat16)
      static_cast<__nv_bfloat16*>(data_)[at] = __float2bfloat16(value);
    else
      static_cast<__half*>(data_)[at] = __float2half(value);
  }
  float get(size_t at) const {
    if (dtype_ == Dtype::kFloat32) return static_cast<const float*>(data_)[at];
    if (dtype_ == Dtype::kBFloat16)
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data_)[at]);
    return __half2float(static_cast<const __half*>(data_)[at]);
  }
  size_t count() const { return bytes_ / size_of(dtype_); }
  size_t bytes() const { return bytes_; }
  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  AnyDtype any() const { return {data_, dtype_}; }

 private:
  Dtype dtype_;
  size_t bytes_;
  void* data_;
};

Buffer random(Dtype dtype, size_t count, float scale) {
  Buffer buffer(dtype, count);
  for (size_t k = 0; k < count; ++k) buffer.put(k, scale * normal());
  return buffer;
}

struct Edit {
  const char* name;
  int total, rows, d, rank, sets;
  Dtype dtype, weights;
  int gap;  // elements between the rows of the hidden state
  bool read, subtract_projection, bias, coeff, in_place, gradient_of_hidden, gradient_of_weights;
  Activation activation;
};

constexpr Dtype kF = Dtype::kFloat32, kB = Dtype::kBFloat16, kH = Dtype::kFloat16;
constexpr Activation kLin = Activation::kLinear;
const Edit kEdits[] = {
    {"one row a block", 14, 9, 72, 5, 1, kF, kF, 0, true, true, true, false, false, true, true,
     kLin},
    {"one row a block, bf16, sets", 14, 9, 64, 8, 3, kB, kF, 0, true, true, true, true, false, true,
     true, Activation::kGelu},
    {"odd d, in place", 14, 9, 37, 3, 2, kH, kH, 0, true, false, true, true, true, true, true,
     Activation::kSilu},
    {"odd stride", 14, 9, 48, 5, 1, kB, kB, 3, true, true, true, false, true, true, true, kLin},
    {"d = 1", 14, 9, 1, 1, 1, kF, kF, 0, true, true, false, false, false, true, true, kLin},
    {"more vectors than warps", 14, 7, 72, 17, 1, kB, kB, 8, true, true, true, true, false, true,
     true, Activation::kTanh},
    {"rank 33", 10, 5, 40, 33, 2, kF, kF, 0, true, true, true, true, false, true, true,
     Activation::kRelu},
    {"rank 256", 4, 2, 264, 256, 1, kH, kF, 0, true, true, true, false, true, true, true,
     Activation::kSigmoid},
    {"no read", 14, 9, 40, 4, 1, kF, kF, 0, false, true, true, true, false, true, true, kLin},
    {"constant", 14, 9, 40, 4, 1, kF, kF, 0, false, false, true, true, false, true, true, kLin},
    {"no gradient of the hidden state", 14, 9, 40, 4, 1, kF, kF, 0, true, true, true, true, false,
     false, true, kLin},
    {"no gradient of weights", 14, 9, 40, 20, 2, kF, kF, 0, true, true, true, true, true, true,
     false, Activation::kGeluTanh},
    {"four rows a block", 300, 269, 24, 3, 1, kF, kF, 0, true, true, true, false, true, true, true,
     kLin},
    {"four rows a block, sets", 300, 269, 40, 18, 3, kB, kB, 0, true, true, true, true, false, true,
     true, Activation::kGelu},
    {"many rows", 700, 590, 40, 3, 2, kB, kF, 0, true, true, true, false, true, true, true, kLin},
    {"two columns a thread", 9, 6, 8192, 3, 1, kB, kF, 0, true, true, true, true, true, true, true,
     kLin},
};

// Edits of one set of half-precision rows, which edit_tiles serves.
struct Tiles {
  const char* name;
  int rows, selected, d, rank;  // selected: 0 for all rows
  Dtype dtype, weights;
  int gap;
  bool read, subtract_projection, bias, coeff, in_place;
  Activation activation;
};

const Tiles kTiles[] = {
    {"tiles, one block", 37, 0, 264, 8, kB, kF, 0, true, true, true, true, true, kLin},
    {"tiles, rank 13", 300, 0, 72, 13, kH, kF, 8, true, true, true, false, false, kLin},
    {"tiles, two products", 40, 0, 264, 3, kB, kB, 0, true, true, true, true, true,
     Activation::kGelu},
    {"tiles, two blocks", 150, 0, 1048, 8, kB, kF, 0, true, false, true, true, true,
     Activation::kTanh},
    {"tiles, eight blocks", 40, 0, 4104, 2, kH, kH, 0, true, true, false, false, false, kLin},
    {"tiles, no read, selected", 300, 270, 40, 4, kB, kF, 0, false, true, true, true, false, kLin},
    {"tiles, two blocks, selected", 300, 270, 1032, 9, kB, kF, 0, true, true, true, true, true,
     kLin},
};

struct Map {
  const char* name;
  int layers, d, rank;
  bool cayley, signs, base, W, grad_R, grad_D;
};

const Map kMaps[] = {
    {"householder, one split", 2, 45, 3, false, true, false, true, true, true},
    {"cayley, one split, base", 2, 45, 8, true, true, true, true, true, true},
    {"householder, d = r", 1, 12, 12, false, false, false, false, true, false},
    {"householder, two splits", 3, 530, 5, false, true, true, true, true, true},
    {"cayley, four splits", 1, 1100, 4, true, true, true, false, true, false},
    {"householder, eight splits", 1, 2080, 8, false, true, true, true, true, true},
    {"cayley, eight splits, rank 32", 1, 2049, 32, true, true, true, true, true, true},
    {"householder, rank 33", 1, 65, 33, false, true, true, true, true, true},
    {"cayley, rank 40, two splits", 1, 520, 40, true, true, true, true, false, true},
    {"householder, rank 70", 1, 80, 70, false, true, true, true, true, true},
    {"cayley, X and a tall point", 1, 7, 1, true, true, true, true, true, true},
};

struct Schedule {
  emulation::Order order;
  unsigned seed;
  unsigned char fill;
};
const Schedule kSchedules[] = {{emulation::Order::kForward, 0, 0xff},
                               {emulation::Order::kReverse, 0, 0x3e},
                               {emulation::Order::kRandom, 7, 0xff}};

void require(bool held, const std::string& name, const char* what) {
  if (held) return;
  printf("%s: %s\n", name.c_str(), what);
  ++failures;
}

void launched(cudaError_t error, const std::string& name) {
  require(error == cudaSuccess, name, error == cudaSuccess ? "" : cudaGetErrorString(error));
}

// Checks that `run` returns the same bits under every schedule.
void repeat(const std::string& name, const std::function<std::vector<Buffer>()>& run) {
  std::vector<Buffer> first;
  for (const Schedule& schedule : kSchedules) {
    if (once && !first.empty()) break;
    emulation::set_order(schedule.order, schedule.seed);
    emulation::set_fill(schedule.fill);
    std::vector<Buffer> found = run();
    for (const Buffer& buffer : found)
      for (size_t k = 0; k < buffer.count(); ++k)
        if (!isfinite(buffer.get(k))) {
          require(false, name, "an output is not finite, or was not written");
          break;
        }
    if (first.empty()) {
      for (const Buffer& buffer : found) first.emplace_back(buffer);
      continue;
    }
    for (size_t k = 0; k < found.size(); ++k)
      require(
          found[k].bytes() == 0 || memcmp(found[k].data(), first[k].data(), found[k].bytes()) == 0,
          name, "the order of the threads, or what shared memory held before, changes an output");
  }
}

struct Weights {
  const Buffer &read, &write, &read_bias, &subtract_bias, &coeff;
};

// The arguments of the forward pass of a case
template <class Case>
EditForward forward_arguments(const Case& c, const Selection& selection, const Weights& weights,
                              const Buffer& source, Buffer& out, Buffer& saved_input, Buffer& u,
                              Buffer& z) {
  EditForward p = {};
  p.selection = selection;
  p.dtype = c.dtype;
  p.weight_dtype = c.weights;
  p.source = c.in_place ? out.data() : source.data();
  p.out = out.data();
  p.source_stride = p.out_stride = c.d + c.gap;
  p.read = weights.read.data();
  p.write = weights.write.data();
  p.read_bias = weights.read_bias.any();
  p.subtract_bias = weights.subtract_bias.any();
  p.coeff = weights.coeff.any();
  p.saved_input = saved_input.data();
  p.u = u.floats();
  p.z = c.activation == kLin ? nullptr : z.floats();
  p.subtract_projection = c.subtract_projection;
  p.activation = c.activation;
  return p;
}

void run_edit(const Edit& c) {
  const int r = c.rank, stride = c.d + c.gap,
            count = small_count(c.subtract_projection, c.activation == kLin),
            padded = padded_rank(r);
  const size_t vectors = size_t(c.sets) * r, n = size_t(c.rows), total = size_t(c.total) * stride;
  const float scale = 1.0f / sqrtf(float(c.d));
  const Buffer hidden = random(c.dtype, total, 1), grad = random(c.dtype, total, 1);
  const Buffer read = random(c.weights, c.read ? vectors * c.d : 0, scale),
               write = random(c.weights, vectors * c.d, scale);
  const Buffer read_bias = random(c.weights, c.bias ? vectors : 0, 0.1f);
  const Buffer subtract_bias = random(kF, c.bias && c.subtract_projection ? vectors : 0, 0.1f);
  const Buffer coeff = random(kF, c.coeff ? n * r : 0, 1);
  std::vector<int32_t> rows(n), sets(n);
  for (size_t k = 0; k < n; ++k) {
    rows[k] = k % 4 == 1 ? -1 : int32_t(c.total - 1 - k);
    sets[k] = rows[k] < 0 ? 12345 : int32_t(generator() % unsigned(c.sets));
  }
  const Selection selection = {rows.data(), c.sets > 1 ? sets.data() : nullptr, c.rows, c.d, r,
                               c.sets};

  repeat(c.name, [&] {
    const Buffer source(hidden), upstream(grad);
    Buffer out(c.in_place ? source : hidden), saved_input(c.dtype, n * c.d), u(kF, n * r),
        z(kF, n * r), small(kF, n * count * padded);
    Buffer grad_coeff(kF, c.coeff ? n * r : 0), grad_hidden(grad);
    const bool weights = c.gradient_of_weights;
    Buffer grad_read(kF, weights && c.read ? vectors * c.d : 0),
        grad_write(kF, weights ? vectors * c.d : 0);
    Buffer grad_read_bias(kF, weights ? vectors : 0),
        grad_subtract_bias(kF, weights && c.subtract_projection ? vectors : 0);

    const EditForward forward =
        forward_arguments(c, selection, {read, write, read_bias, subtract_bias, coeff}, source, out,
                          saved_input, u, z);
    launched(edit_forward(forward, nullptr), c.name);

    EditDelta delta = {};
    delta.selection = selection;
    delta.dtype = c.dtype;
    delta.weight_dtype = c.weights;
    delta.grad = c.in_place ? grad_hidden.data() : upstream.data();
    delta.grad_stride = stride;
    delta.write = write.data();
    delta.coeff = coeff.any();
    delta.u = u.floats();
    delta.z = forward.z;
    delta.small = small.floats();
    delta.grad_coeff = grad_coeff.floats();
    delta.activation = c.activation;
    launched(edit_delta(delta, count, nullptr), c.name);

    EditGradient gradient = {};
    gradient.selection = selection;
    gradient.dtype = c.dtype;
    gradient.grad = delta.grad;
    gradient.out = c.gradient_of_hidden ? grad_hidden.data() : nullptr;
    gradient.saved_input = saved_input.data();
    gradient.grad_stride = gradient.out_stride = stride;
    gradient.kept_stride = c.d;
    gradient.read = read.any();
    gradient.write = write.any();
    gradient.small = small.floats();
    gradient.grad_read = grad_read.floats();
    gradient.grad_read_bias = grad_read_bias.floats();
    gradient.grad_write = grad_write.floats();
    gradient.grad_subtract_bias = grad_subtract_bias.floats();
    gradient.subtract_projection = c.subtract_projection;
    gradient.linear = c.activation == kLin;
    launched(edit_gradient(gradient, nullptr), c.name);
    std::vector<Buffer> found{out,        saved_input,       u,         small,
                              grad_coeff, grad_hidden,       grad_read, grad_read_bias,
                              grad_write, grad_subtract_bias};
    if (c.activation != kLin) found.push_back(z);
    return found;
  });
}

void run_tiles(const Tiles& c) {
  const int r = c.rank, stride = c.d + c.gap;
  const size_t n = size_t(c.selected > 0 ? c.selected : c.rows), vectors = size_t(r) * c.d;
  const float scale = 1.0f / sqrtf(float(c.d));
  const Buffer hidden = random(c.dtype, size_t(c.rows) * stride, 1);
  const Buffer read = random(c.weights, c.read ? vectors : 0, scale),
               write = random(c.weights, vectors, scale);
  const Buffer read_bias = random(kF, c.bias ? r : 0, 0.1f),
               subtract_bias = random(kF, c.bias && c.subtract_projection ? r : 0, 0.1f),
               coeff = random(kF, c.coeff ? n * r : 0, 1);
  std::vector<int32_t> rows(n);
  for (size_t k = 0; k < n; ++k) rows[k] = k % 4 == 1 ? -1 : int32_t(c.rows - 1 - k);

  repeat(c.name, [&] {
    const Buffer source(hidden);
    Buffer out(hidden), saved_input(c.dtype, c.selected > 0 ? n * c.d : 0), u(kF, n * r),
        z(kF, c.activation == kLin ? 0 : n * r);
    const Selection selection = {c.selected > 0 ? rows.data() : nullptr, nullptr, int64_t(n), c.d, r,
                                 1};
    const EditForward p = forward_arguments(
        c, selection, {read, write, read_bias, subtract_bias, coeff}, source, out, saved_input, u, z);
    require(edit_tiles_serves(p), c.name, "edit_tiles does not serve this case");
    launched(edit_forward(p, nullptr), c.name);
    return std::vector<Buffer>{out, saved_input, u, z};
  });
}

void run_map(const Map& c) {
  const int layers = c.layers, d = c.d, r = c.rank;
  const size_t tall = size_t(layers) * d * r;
  Buffer X = random(kF, tall, 0.3f / sqrtf(float(d)));
  const Buffer base = random(kF, c.base ? tall : 0, 0.1f),
               point = random(kF, c.base ? tall : 0, 0.1f), W = random(kF, tall, 1);
  const Buffer grad_R = random(kF, tall, 1), grad_D = random(kF, tall, 1);
  Buffer signs(kF, size_t(layers) * r);
  for (size_t k = 0; k < signs.count(); ++k) signs.put(k, k % 3 == 1 ? -1.0f : 1.0f);
  for (int layer = 0; layer < layers; ++layer)  // entries that are never read
    for (int i = 0; i < r; ++i)
      for (int j = i; j < r; ++j) X.put((size_t(layer) * d + i) * r + j, NAN);

  repeat(c.name, [&] {
    Buffer R(kF, tall), D(kF, c.W ? tall : 0), aux(kF, size_t(layers) * (c.base ? 2 : 1) * r * r),
        grad_X(kF, tall);
    BuildForward forward = {layers,
                            d,
                            r,
                            c.cayley,
                            X.floats(),
                            c.signs ? signs.floats() : nullptr,
                            base.floats(),
                            point.floats(),
                            c.W ? W.floats() : nullptr,
                            R.floats(),
                            D.floats(),
                            aux.floats()};
    BuildPlan plan = {};
    launched(build_forward_plan(layers, d, r, &plan), c.name);
    const Buffer scratch(kF, size_t(plan.scratch_bytes) / sizeof(float));
    launched(build_forward(forward, plan, scratch.data(), nullptr), c.name);
    BuildBackward backward = {layers,
                              d,
                              r,
                              c.cayley,
                              c.grad_R ? grad_R.floats() : nullptr,
                              c.grad_D ? grad_D.floats() : nullptr,
                              X.floats(),
                              forward.signs,
                              base.floats(),
                              aux.floats(),
                              grad_X.floats()};
    launched(build_backward_plan(layers, d, r, &plan), c.name);
    const Buffer again(kF, size_t(plan.scratch_bytes) / sizeof(float));
    launched(build_backward(backward, plan, again.data(), nullptr), c.name);
    return std::vector<Buffer>{R, D, aux, grad_X};
  });
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> wanted(arguments + 1, arguments + count);
  once = !wanted.empty() && wanted[0] == "--once";
  if (once) wanted.erase(wanted.begin());
  int ran = 0;
  const auto chosen = [&](const std::string& name) {
    bool found = wanted.empty();
    for (const std::string& part : wanted) found = found || name.find(part) != std::string::npos;
    ran += found;
    return found;
  };
  for (const Edit& edit : kEdits)
    if (chosen(edit.name)) run_edit(edit);
  if (emulation::kArch >= 900)
    for (const Tiles& tiles : kTiles)
      if (chosen(tiles.name)) run_tiles(tiles);
  for (const Map& map : kMaps)
    if (chosen(map.name)) run_map(map);
  printf("%d cases, %lld launches, %d failures\n", ran,
         static_cast<long long>(emulation::launches()), failures);
  return failures == 0 && ran > 0 ? 0 : 1;
}
