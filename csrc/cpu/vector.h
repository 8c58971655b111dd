// SIMD vectors with converting loads and stores, compiled per instruction set (namespace REFT_ISA).
// Standard library templates must not be used here: the linker would merge their copies.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__) || defined(__F16C__)
#  include <immintrin.h>
#endif

#ifndef REFT_ISA
#  error "REFT_ISA names the namespace of the instruction set: avx512bf16, avx512, avx2 or portable"
#endif

#define REFT_INLINE inline __attribute__((always_inline))

namespace reft {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

namespace REFT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Accumulation dtype of a storage type: fp64 for fp64, else fp32.
template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulation<T>::type;

// A vector of A (float or double), as a GCC vector extension type.
template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using vec = typename VectorOf<A>::type;

// Number of elements A in a vector.
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class A>
REFT_INLINE vec<A> broadcast(A value) {
  return value - vec<A>{};
}

// a * b + c, compiled to one FMA instruction where available (-ffp-contract=fast).
template <class V>
REFT_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

// Sum of the lanes in a fixed order: the halves are added until one lane is left.
template <class A>
REFT_INLINE A lane_sum(vec<A> v) {
  A lanes[kLanes<A>];
  memcpy(lanes, &v, sizeof(v));
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// ---- scalars

REFT_INLINE float to_acc(float v) { return v; }
REFT_INLINE double to_acc(double v) { return v; }
REFT_INLINE float to_acc(bf16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
REFT_INLINE float to_acc(fp16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  // The multiplication rebases the exponent and also handles subnormals; infinities and NaN are
  // separate.
  uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13, sign = uint32_t(v.bits & 0x8000) << 16,
           bits;
  float out;
  if (magnitude >= 0x0f800000u) {
    bits = magnitude | 0x7f800000u;
  } else {
    memcpy(&out, &magnitude, 4);
    out *= 0x1p112f;
    memcpy(&bits, &out, 4);
  }
  bits |= sign;
  memcpy(&out, &bits, 4);
  return out;
#endif
}

REFT_INLINE void from_acc(float v, float* out) { *out = v; }
REFT_INLINE void from_acc(double v, double* out) { *out = v; }
REFT_INLINE void from_acc(float v, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  // Rounds to nearest even; a NaN keeps its upper bits and becomes quiet.
  out->bits =
      v != v ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
REFT_INLINE void from_acc(float v, fp16* out) {
#if defined(__F16C__)
  out->bits = uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  uint32_t bits;
  memcpy(&bits, &v, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) {
    out->bits = uint16_t(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more: infinity
    out->bits = uint16_t(sign | 0x7c00);
    // Subnormal: adding 0.5 aligns the last bit, so that the hardware rounds.
  } else if (magnitude < 0x38800000u) {
    float aligned, half = 0.5f;
    memcpy(&aligned, &magnitude, 4);
    aligned += half;
    memcpy(&bits, &aligned, 4);
    out->bits = uint16_t(sign | (bits - 0x3f000000u));
  } else {
    magnitude += 0xc8000fffu + ((magnitude >> 13) & 1);
    out->bits = uint16_t(sign | (magnitude >> 13));
  }
#endif
}

// ---- whole vectors: acc_t<T> lanes from contiguous T, unaligned

REFT_INLINE vec<float> load(const float* p) {
  vec<float> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
REFT_INLINE vec<double> load(const double* p) {
  vec<double> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
REFT_INLINE vec<float> load(const bf16* p) {
#if defined(__AVX512F__)
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  VectorOf<float>::bits bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = uint32_t(p[i].bits) << 16;
  return (vec<float>)bits;
#endif
}
REFT_INLINE vec<float> load(const fp16* p) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

REFT_INLINE void store(float* p, vec<float> v) { memcpy(p, &v, sizeof(v)); }
REFT_INLINE void store(double* p, vec<double> v) { memcpy(p, &v, sizeof(v)); }
#if defined(__AVX512BF16__)
// Unlike the integer version below, this instruction flushes subnormal inputs to zero.
REFT_INLINE void store(bf16* p, vec<float> v) {
  __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &rounded, sizeof(rounded));
}
#else
REFT_INLINE void store(bf16* p, vec<float> v) {
  typedef VectorOf<float>::bits bits_t;
  bits_t bits = (bits_t)v;
  bits_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits_t quiet = (bits >> 16) | 0x40;
  bits_t nan = (bits_t)(v != v);
  bits = (rounded & ~nan) | (quiet & nan);
#  if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bits));
#  else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = uint16_t(bits[i]);
#  endif
}
#endif
REFT_INLINE void store(fp16* p, vec<float> v) {
#if defined(__AVX512F__)
  __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif defined(__AVX2__)
  __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  for (int i = 0; i < kLanes<float>; ++i) from_acc(v[i], p + i);
#endif
}

// ---- non-temporal stores to aligned addresses; call end_streams() before other threads read

#if defined(__AVX512F__)
REFT_INLINE void stream(float* p, vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
REFT_INLINE void stream(double* p, vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
#elif defined(__AVX2__)
REFT_INLINE void stream(float* p, vec<float> v) { _mm256_stream_ps(p, (__m256)v); }
REFT_INLINE void stream(double* p, vec<double> v) { _mm256_stream_pd(p, (__m256d)v); }
#else
REFT_INLINE void stream(float* p, vec<float> v) { store(p, v); }
REFT_INLINE void stream(double* p, vec<double> v) { store(p, v); }
#endif
// bf16 and fp16, rounded as in store().
template <class T>
REFT_INLINE void stream(T* p, vec<float> v) {
#if defined(__AVX2__)
  alignas(32) T half[kLanes<float>];
  store(half, v);
#  if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(half));
#  else
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(half));
#  endif
#else
  store(p, v);
#endif
}
REFT_INLINE void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// ---- partial vectors of `count` lanes (0 < count < kLanes); the other lanes are zero and not
// stored

template <class T>
REFT_INLINE vec<acc_t<T>> load_part(const T* p, int count) {
  T padded[kLanes<acc_t<T>>];
  memset(padded, 0, sizeof(padded));
  memcpy(padded, p, size_t(count) * sizeof(T));
  return load(padded);
}
template <class T>
REFT_INLINE void store_part(T* p, vec<acc_t<T>> v, int count) {
  T padded[kLanes<acc_t<T>>];
  store(padded, v);
  memcpy(p, padded, size_t(count) * sizeof(T));
}

}  // namespace REFT_ISA
}  // namespace reft
