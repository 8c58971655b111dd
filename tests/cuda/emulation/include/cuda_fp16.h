// Emulation of CUDA's fp16 type: storage, and conversions that round to nearest even.
#pragma once

#include <stdint.h>
#include <string.h>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  if (magnitude < 0x0400) {  // a multiple of 2^-24
    const float result = float(magnitude) * 0x1p-24f;
    return sign ? -result : result;
  }
  const uint32_t bias = magnitude >= 0x7c00 ? (255 - 31) << 23 : (127 - 15) << 23;
  const uint32_t bits = sign | ((magnitude << 13) + bias);
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

inline __half __float2half(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {0x7fff};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above become infinity
  if (bits < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, sizeof bits);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + (bits >> 13 & 1);
  return {uint16_t(sign | ((bits - ((127 - 15) << 23)) >> 13))};
}
