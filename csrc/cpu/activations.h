// act(z) and act'(z) of a scalar. They are applied to [N, r], so their cost is small compared with
// the products over [N, d].
#pragma once

#include <math.h>

#include "edit.h"
#include "vector.h"

namespace reft {
namespace REFT_ISA {

REFT_INLINE float erf_of(float v) { return erff(v); }
REFT_INLINE double erf_of(double v) { return erf(v); }
REFT_INLINE float exp_of(float v) { return expf(v); }
REFT_INLINE double exp_of(double v) { return exp(v); }
REFT_INLINE float tanh_of(float v) { return tanhf(v); }
REFT_INLINE double tanh_of(double v) { return tanh(v); }

constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588, kGeluCubic = 0.044715;

template <class A>
inline A activate(A z, Activation activation) {
  switch (activation) {
    case Activation::linear:
      return z;
    case Activation::relu:
      return z < A(0) ? A(0) : z;  // propagates NaN
    case Activation::gelu:
      return A(0.5) * z * (A(1) + erf_of(z * A(kSqrtHalf)));
    case Activation::gelu_tanh:
      return A(0.5) * z * (A(1) + tanh_of(A(kSqrt2OverPi) * (z + A(kGeluCubic) * z * z * z)));
    case Activation::silu:
      return z / (A(1) + exp_of(-z));
    case Activation::tanh:
      return tanh_of(z);
    case Activation::sigmoid:
      return A(1) / (A(1) + exp_of(-z));
  }
  return z;
}

template <class A>
inline A activation_derivative(A z, Activation activation) {
  switch (activation) {
    case Activation::linear:
      return A(1);
    case Activation::relu:
      return z > A(0) ? A(1) : A(0);
    case Activation::gelu:
      return A(0.5) * (A(1) + erf_of(z * A(kSqrtHalf))) +
             z * exp_of(A(-0.5) * z * z) * A(kInvSqrt2Pi);
    case Activation::gelu_tanh: {
      A t = tanh_of(A(kSqrt2OverPi) * (z + A(kGeluCubic) * z * z * z));
      A inner = A(kSqrt2OverPi) * (A(1) + A(3 * kGeluCubic) * z * z);
      return A(0.5) * (A(1) + t) + A(0.5) * z * (A(1) - t * t) * inner;
    }
    case Activation::silu: {
      A s = A(1) / (A(1) + exp_of(-z));
      return s * (A(1) + z * (A(1) - s));
    }
    case Activation::tanh: {
      A t = tanh_of(z);
      return A(1) - t * t;
    }
    case Activation::sigmoid: {
      A s = A(1) / (A(1) + exp_of(-z));
      return s * (A(1) - s);
    }
  }
  return A(1);
}

}  // namespace REFT_ISA
}  // namespace reft
