// Vectors and the few functions on them that the kernels need, in GCC's and Clang's vector extensions: one source for
// every instruction set, chosen by the compiler's flags.
//
// Everything lives in a namespace named after the instruction set, so that the linker never merges a function compiled
// for one with its namesake compiled for another. For the same reason no function of the standard library is used here.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SASA_ISA
#error "SASA_ISA: the name of the instruction set this file is compiled for"
#endif

#define SASA_INLINE inline __attribute__((always_inline))
#define SASA_NOINLINE __attribute__((noinline))
#define SASA_UNROLL _Pragma("GCC unroll 16")

namespace sasa {
namespace SASA_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// P numbers of type T, float or double: P lanes.
template <class T_, int P_>
struct Vector {
  using T = T_;
  static constexpr int P = P_;
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T V __attribute__((vector_size(P_ * sizeof(T_))));
  using Unsigned = std::make_unsigned_t<Int>;
  typedef Int I __attribute__((vector_size(P_ * sizeof(T_))));
  typedef Unsigned U __attribute__((vector_size(P_ * sizeof(T_))));  // for arithmetic on bits, which may wrap

  typedef T Loose __attribute__((vector_size(P_ * sizeof(T_)), aligned(sizeof(T_)), may_alias));  // any alignment

  static SASA_INLINE V all(T x) { return all_of(x, std::make_index_sequence<P_>{}); }
  static SASA_INLINE V max(V a, V b) { return a > b ? a : b; }

 private:
  // Not zero plus x: that addition would lose the sign of a zero.
  template <size_t... Lane>
  static SASA_INLINE V all_of(T x, std::index_sequence<Lane...>) {
    return V{(void(Lane), x)...};
  }
};

// The vector at an address that need not be aligned to vectors.
template <class W>
SASA_INLINE typename W::Loose& loose(typename W::T* x) {
  return *reinterpret_cast<typename W::Loose*>(x);
}
template <class W>
SASA_INLINE const typename W::Loose& loose(const typename W::T* x) {
  return *reinterpret_cast<const typename W::Loose*>(x);
}

// Keeps a loaded vector in a register: compilers otherwise reload it for every product it takes part in.
#if defined(__x86_64__)
#define SASA_IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define SASA_IN_REGISTER(v) __asm__("" : "+w"(v))
#else
#define SASA_IN_REGISTER(v)
#endif

constexpr int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class To, class From>
SASA_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// sum + a * b: of numbers, or of both of the bfloat16 numbers in the halves of each lane, added in float32.
struct MultiplyAdd {
  template <class V>
  static SASA_INLINE V add(V sum, V a, V b) {
    return a * b + sum;
  }
};
#if defined(__AVX512BF16__)
struct MultiplyAddPairs {
  template <class V>
  static SASA_INLINE V add(V sum, V a, V b) {
    if constexpr (sizeof(V) == 64)
      return bits_as<V>(_mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(a), bits_as<__m512bh>(b)));
    else
      return bits_as<V>(_mm256_dpbf16_ps(bits_as<__m256>(sum), bits_as<__m256bh>(a), bits_as<__m256bh>(b)));
  }
};
#else
using MultiplyAddPairs = MultiplyAdd;  // never used
#endif

// a0 + x * (a1 + x * (a2 + ...))
template <class V, class T, int N>
SASA_INLINE V polynomial(V x, const T (&a)[N]) {
  V y = V{} + a[N - 1];
  SASA_UNROLL
  for (int i = N - 2; i >= 0; --i) y = y * x + a[i];
  return y;
}

template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float kRound = 0x1.8p23f + 127;  // adding it rounds to an integer, found in the low bits
  static constexpr float kLog2e = 0x1.715476p0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kLeast = -88.0f;  // at 2^-127 and below exp is flushed to 0
  static constexpr int kMantissa = 23;
  static constexpr int32_t kExponents = 0x3f800000, kFractions = 0x007fffff, kSqrtHalf = 0x3f3504f3;
  // Minimax polynomial of exp on [-ln 2 / 2, ln 2 / 2], relative error 4e-9 before rounding.
  static constexpr float kExp[] = {1.0f,           1.0f,           0x1.fffffcp-2f, 0x1.555492p-3f,
                                   0x1.5558f2p-5f, 0x1.1239e2p-7f, 0x1.6a2432p-10f};
  // The same of 2^x on [-1/2, 1/2], relative error 3e-6; exact at 0.
  static constexpr float kExp2[] = {1.0f, 0x1.62e12cp-1f, 0x1.ec0326p-3f, 0x1.c9fcb2p-5f, 0x1.3a1804p-7f};
  // 2 artanh(z) / z in powers of z^2.
  static constexpr float kLog[] = {2.0f, 2.0f / 3, 2.0f / 5, 2.0f / 7, 2.0f / 9};
};

template <>
struct Constants<double> {
  static constexpr double kRound = 0x1.8p52 + 1023;
  static constexpr double kLog2e = 0x1.71547652b82fep0, kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kLeast = -709.0;
  static constexpr int kMantissa = 52;
  static constexpr int64_t kExponents = 0x3ff0000000000000, kFractions = 0x000fffffffffffff,
                           kSqrtHalf = 0x3fe6a09e667f3bcd;
  // Taylor polynomial of degree 13: relative error 5e-18 before rounding.
  static constexpr double kExp[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  static constexpr double kLog[] = {2.0,      2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9, 2.0 / 11,
                                    2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};
};

// x * 2^n for whole n, where AVX-512 has an instruction for it.
#if defined(__AVX512F__)
#define SASA_HAS_SCALE 1
SASA_INLINE __m512 scale(__m512 x, __m512 n) { return _mm512_scalef_ps(x, n); }
SASA_INLINE __m256 scale(__m256 x, __m256 n) { return _mm256_scalef_ps(x, n); }
SASA_INLINE __m512d scale(__m512d x, __m512d n) { return _mm512_scalef_pd(x, n); }
SASA_INLINE __m256d scale(__m256d x, __m256d n) { return _mm256_scalef_pd(x, n); }
#else
#define SASA_HAS_SCALE 0
#endif

// exp(x) for x <= 0; 0 where the result is below the normal numbers; NaN stays NaN. Within 2 units in the last place,
// or within 4e-6 of the result if `kHalf`: far less than half precision can tell, in three operations fewer.
template <class W, bool kHalf>
SASA_INLINE typename W::V exp_of_negative(typename W::V x) {
  using C = Constants<typename W::T>;
  using V = typename W::V;
  x = W::max(W::all(SASA_HAS_SCALE ? 2 * C::kLeast : C::kLeast), x);  // the second operand if one is NaN
  const V shifted = x * C::kLog2e + C::kRound;
  const V n = shifted - C::kRound;
  V y;
  if constexpr (kHalf)
    y = polynomial(x * C::kLog2e - n, C::kExp2);
  else
    y = polynomial((x - n * C::kLn2High) - n * C::kLn2Low, C::kExp);
#if SASA_HAS_SCALE
  return scale(y, n);
#else
  // The low bits of `shifted` are n plus the exponent bias: 0 at kLeast, where the power is 0. A multiplication, so
  // that NaN stays NaN.
  return y * bits_as<V>(bits_as<typename W::U>(shifted) << C::kMantissa);
#endif
}

// w = exp(w - shift), for w <= shift; returns the sum. Half-wide vectors are computed two at a time, and wide ones
// added in the same order, so the number of lanes makes no difference.
template <class W, bool kHalf>
SASA_INLINE typename W::V exp_all(typename W::V* w, int64_t count, typename W::V shift) {
  using V = typename W::V;
  V sum{};
  int64_t i = 0;
  if constexpr (2 * sizeof(V) == kVectorBytes) {
    using Wide = Vector<typename W::T, 2 * W::P>;
    typename Wide::V shifts, sums{};
    memcpy(&shifts, &shift, sizeof(V));
    memcpy(reinterpret_cast<char*>(&shifts) + sizeof(V), &shift, sizeof(V));
    for (; i + 2 <= count; i += 2) {
      typename Wide::V pair;
      memcpy(&pair, w + i, sizeof(pair));
      pair = exp_of_negative<Wide, kHalf>(pair - shifts);
      memcpy(w + i, &pair, sizeof(pair));
      sums += pair;
    }
    V halves[2];
    memcpy(halves, &sums, sizeof(sums));
    sum = halves[0] + halves[1];
  }
  V even{}, odd{};
  for (; i + 2 <= count; i += 2) {
    even += w[i] = exp_of_negative<W, kHalf>(w[i] - shift);
    odd += w[i + 1] = exp_of_negative<W, kHalf>(w[i + 1] - shift);
  }
  sum += even + odd;
  if (i < count) sum += w[i] = exp_of_negative<W, kHalf>(w[i] - shift);
  return sum;
}

// log(x) for finite x >= 1; NaN stays NaN.
template <class W>
SASA_INLINE typename W::V log_of_sum(typename W::V x) {
  using C = Constants<typename W::T>;
  using I = typename W::I;
  using V = typename W::V;
  // x = 2^e * m with m in [sqrt(1/2), sqrt(2)).
  using U = typename W::U;
  const U shifted = bits_as<U>(x) - typename W::Unsigned(C::kSqrtHalf);
  const I e = bits_as<I>(shifted) >> C::kMantissa;  // signed: the exponent of a NaN may be negative
  const V m = bits_as<V>((shifted & typename W::Unsigned(C::kFractions)) + typename W::Unsigned(C::kSqrtHalf));
  const V z = (m - 1) / (m + 1);
  const V log_m = z * polynomial(z * z, C::kLog);
  const V n = __builtin_convertvector(e, V);
  return (n * C::kLn2High + (n * C::kLn2Low + log_m)) + (x - x);
}

// The two results of exchanging the odd blocks of `a` with the even blocks of `b`, blocks of H lanes.
template <class W, int H, size_t... E>
SASA_INLINE void exchange(typename W::V& a, typename W::V& b, std::index_sequence<E...>) {
  constexpr int P = W::P;
#if defined(__clang__) || __GNUC__ >= 12
  const auto low = __builtin_shufflevector(a, b, ((E & H) == 0 ? E : P + E - H)...);
  const auto high = __builtin_shufflevector(a, b, ((E & H) == 0 ? E + H : P + E)...);
#else
  const auto low = __builtin_shuffle(a, b, typename W::I{((E & H) == 0 ? E : P + E - H)...});
  const auto high = __builtin_shuffle(a, b, typename W::I{((E & H) == 0 ? E + H : P + E)...});
#endif
  a = low;
  b = high;
}

// A vector of two halves.
template <class W, size_t... E, class H>
SASA_INLINE typename W::V join_lanes(H low, H high, std::index_sequence<E...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(low, high, E...);
#else
  H halves[2] = {low, high};
  return bits_as<typename W::V>(halves);
#endif
}

template <class W, class H>
SASA_INLINE typename W::V join(H low, H high) {
  return join_lanes<W>(low, high, std::make_index_sequence<W::P>{});
}

template <class W, int H = W::P / 2>
SASA_INLINE void transpose(typename W::V (&rows)[W::P]) {
  if constexpr (H > 0) {
    SASA_UNROLL
    for (int i = 0; i < W::P; ++i)
      if ((i & H) == 0) exchange<W, H>(rows[i], rows[i + H], std::make_index_sequence<W::P>{});
    transpose<W, H / 2>(rows);
  }
}

}  // namespace SASA_ISA
}  // namespace sasa
