// The emulated tensor cores. Their hardware does not document how it rounds the sum of the products;
// here it is exact and then truncated, which is not better than what they have been seen to do.
#include <math.h>
#include <string.h>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "machine.h"

namespace emulation {
namespace {

struct Operands {
  float* sum;
  const uint32_t *a, *b;
  int depth;
  bool bf16;
};

double element(const uint32_t* registers, int at, bool bf16) {
  const auto bits = uint16_t(registers[at / 2] >> (at % 2 * 16));
  return bf16 ? double(__bfloat162float({bits})) : double(__half2float({bits}));
}

float truncated(double value) {
  const auto rounded = float(value);
  const bool over = fabs(double(rounded)) > fabs(value) && isfinite(value);
  return over ? nextafterf(rounded, 0.0f) : rounded;
}

void multiply(void* const* lanes) {
  double a[16][16], b[16][8];
  const auto lane_of = [&](int lane) { return *static_cast<const Operands*>(lanes[lane]); };
  const int depth = lane_of(0).depth;
  for (int lane = 0; lane < 32; ++lane) {
    const Operands own = lane_of(lane);
    const int group = lane / 4, first = lane % 4 * 2;
    for (int at = 0; at < depth / 2; ++at)  // registers of rows group and group + 8 alternate
      a[group + at / 2 % 2 * 8][first + at % 2 + at / 4 * 8] = element(own.a, at, own.bf16);
    for (int at = 0; at < depth / 4; ++at)
      b[first + at % 2 + at / 2 * 8][group] = element(own.b, at, own.bf16);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int at = 0; at < 4; ++at) {
      float& sum = lane_of(lane).sum[at];
      const int row = lane / 4 + at / 2 * 8, column = lane % 4 * 2 + at % 2;
      double total = sum;
      for (int k = 0; k < depth; ++k) total += a[row][k] * b[k][column];
      sum = truncated(total);
    }
}

}  // namespace

void multiply_add(float (&sum)[4], const uint32_t* a, const uint32_t* b, int depth, bool bf16,
                  Site site) {
  Operands operands = {sum, a, b, depth, bf16};
  with_lanes(&operands, multiply, site);
}

}  // namespace emulation
