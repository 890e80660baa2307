// Numbers as tensors store them and as the kernels compute with them: half precision is computed in float32.
#pragma once

#include "simd.h"

namespace sasa {
namespace SASA_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct Compute {
  using T = float;
};
template <>
struct Compute<double> {
  using T = double;
};

// Whether numbers of this type are multiplied as they are stored, two at a time.
#if defined(__AVX512BF16__)
template <class S>
constexpr bool is_multiplied_in_pairs = std::is_same_v<S, BFloat16>;
#else
template <class S>
constexpr bool is_multiplied_in_pairs = false;
#endif

SASA_INLINE float widen(float x) { return x; }
SASA_INLINE double widen(double x) { return x; }
SASA_INLINE float widen(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
SASA_INLINE float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // The product rebases the exponent and makes half's subnormal numbers normal.
  uint32_t y = bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00u) y |= 0x7f800000u;  // infinity and NaN
  return bits_as<float>(y | (uint32_t(x.bits & 0x8000u) << 16));
}

// Rounds to nearest, ties to even.
SASA_INLINE void narrow(float x, float& y) { y = x; }
SASA_INLINE void narrow(double x, double& y) { y = x; }
SASA_INLINE void narrow(float x, BFloat16& y) {
  const uint32_t u = bits_as<uint32_t>(x);
  y.bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
SASA_INLINE void narrow(float x, Float16& y) {
  uint32_t u = bits_as<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  uint32_t h;
  if (u > 0x7f800000u)
    h = 0x7e00u;  // NaN
  else if (u >= 0x477ff000u)
    h = 0x7c00u;  // 65520 and above round to infinity
  else if (u < 0x38800000u)
    h = bits_as<uint32_t>(bits_as<float>(u) + 0.5f) - 0x3f000000u;  // subnormal: the sum rounds to multiples of 2^-24
  else
    h = (u + 0xc8000fffu + ((u >> 13) & 1)) >> 13;
  y.bits = uint16_t(h | sign);
}

// P numbers: the first `count` from `from`, then zeros. Reads nothing past them.
template <class W, class S>
SASA_INLINE typename W::V load_some(const S* from, int count) {
  alignas(64) typename W::T numbers[W::P] = {};
  for (int i = 0; i < count; ++i) numbers[i] = widen(from[i]);
  typename W::V v;
  memcpy(&v, numbers, sizeof(v));
  return v;
}

template <class W, class S>
SASA_INLINE typename W::V load_all(const S* from) {
  typename W::V v;
  if constexpr (std::is_same_v<S, typename W::T>) {
    memcpy(&v, from, sizeof(v));
    return v;
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    typedef uint16_t Half __attribute__((vector_size(2 * W::P)));
    Half h;
    memcpy(&h, from, sizeof(h));
    return bits_as<typename W::V>(__builtin_convertvector(h, typename W::U) << 16);
  }
#if defined(__AVX512F__)
  else if constexpr (W::P == 16)
    return bits_as<typename W::V>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#endif
#if defined(__AVX2__)
  else if constexpr (W::P == 8)
    return bits_as<typename W::V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
  else
    return load_some<W>(from, W::P);
}

template <class W, class S>
SASA_INLINE typename W::V load(const S* from, int count) {
  if (count == W::P) return load_all<W>(from);
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (std::is_same_v<S, float> && W::P == 16)
    return bits_as<typename W::V>(_mm512_maskz_loadu_ps(__mmask16(mask), from));
  else if constexpr (std::is_same_v<S, float> && W::P == 8)
    return bits_as<typename W::V>(_mm256_maskz_loadu_ps(__mmask8(mask), from));
  else if constexpr (sizeof(S) == 2 && W::P == 16) {
    S numbers[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers), _mm256_maskz_loadu_epi16(__mmask16(mask), from));
    return load_all<W>(numbers);
  } else if constexpr (sizeof(S) == 2 && W::P == 8) {
    S numbers[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(numbers), _mm_maskz_loadu_epi16(__mmask8(mask), from));
    return load_all<W>(numbers);
  } else
    return load_some<W>(from, count);
#else
  return load_some<W>(from, count);
#endif
}

// Rounds two vectors to bfloat16, into the low and the high halves of one. Numbers below the normal ones become 0, as
// the products of pairs take them.
#if defined(__AVX512BF16__)
template <class V>
SASA_INLINE V pair(V low, V high) {
  if constexpr (sizeof(V) == 64) {
    const auto half = [](V v) {
      return _mm512_cvtepu16_epi32(bits_as<__m256i>(_mm512_cvtneps_pbh(bits_as<__m512>(v))));
    };
    return bits_as<V>(_mm512_or_si512(half(low), _mm512_slli_epi32(half(high), 16)));
  } else {
    const auto half = [](V v) {
      return _mm256_cvtepu16_epi32(bits_as<__m128i>(_mm256_cvtneps_pbh(bits_as<__m256>(v))));
    };
    return bits_as<V>(_mm256_or_si256(half(low), _mm256_slli_epi32(half(high), 16)));
  }
}
#else
template <class V>
SASA_INLINE V pair(V low, V) {
  return low;  // never used
}
#endif

// Writes the first `count` numbers and nothing past them.
template <class W, class S>
SASA_INLINE void store(S* to, typename W::V v, int count) {
  if constexpr (std::is_same_v<S, typename W::T>) {
    if (count == W::P) {
      memcpy(to, &v, sizeof(v));
      return;
    }
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4 && W::P == 16) {
      _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), bits_as<__m512>(v));
      return;
    } else if constexpr (sizeof(S) == 4 && W::P == 8) {
      _mm256_mask_storeu_ps(to, __mmask8((1u << count) - 1), bits_as<__m256>(v));
      return;
    }
#endif
  }
  [[maybe_unused]] const auto store_halves = [&](auto stored) { memcpy(to, &stored, size_t(count) * 2); };
  if constexpr (std::is_same_v<S, BFloat16>) {  // as narrow() does
    typedef uint16_t Halves __attribute__((vector_size(2 * W::P)));
    const auto u = bits_as<typename W::U>(v);
    const auto rounded = v != v ? typename W::U{} + 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return store_halves(__builtin_convertvector(rounded, Halves));
  }
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, Float16> && W::P == 16)
    return store_halves(_mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__AVX2__)
  if constexpr (std::is_same_v<S, Float16> && W::P == 8)
    return store_halves(_mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
  alignas(64) typename W::T numbers[W::P];
  memcpy(numbers, &v, sizeof(v));
  if (count == W::P) {  // a loop of known length is vectorized
    S stored[W::P];
    for (int i = 0; i < W::P; ++i) narrow(numbers[i], stored[i]);
    memcpy(to, stored, sizeof(stored));
  } else {
    for (int i = 0; i < count; ++i) narrow(numbers[i], to[i]);
  }
}

}  // namespace SASA_ISA
}  // namespace sasa
