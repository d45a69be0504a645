/* SIMD vectors of 32 bytes, elements of maps, and products of small matrices whose rows are padded
   to whole vectors. REAL, float or double, is the type of weights, sums and small matrices. Maps
   have it too, or with -DBFLOAT16 or -DFLOAT16, beside REAL = float, elements of 16 bits. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#if defined __x86_64__ && (defined BFLOAT16 || defined FLOAT16)
#include <immintrin.h>
#endif

typedef int64_t I;
typedef REAL Vec __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
#define LANES ((I)(32 / sizeof(REAL)))
typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 4, (int32_t)0, (int64_t)0)) Bits;
typedef Bits VecBits __attribute__((vector_size(32)));
/* Macros instantiate a loop for T = Vec, and for T = One: the elements after the last vector. */
typedef REAL One;
#define AT(T, pointer) (*(const T *)(pointer))
#define SET(T, pointer) (*(T *)(pointer))
#define INLINE static inline __attribute__((always_inline))
#define LOAD(pointer) AT(Vec, pointer)
#define STORE(pointer) SET(Vec, pointer)

/* Elements of maps: READ(T, pointer) is of type T, WRITE(T, pointer, value) rounds to nearest even. */
#define READ(T, pointer) read_##T(pointer)
#define WRITE(T, pointer, value) write_##T(pointer, value)
#if defined BFLOAT16
typedef uint16_t Map;
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4), may_alias));
INLINE Vec read_Vec(const Map *from) {
  return (Vec)(__builtin_convertvector(AT(Halves, from), Words) << 16);
}
INLINE REAL read_One(const Map *from) {
  return ((union { uint32_t bits; float value; }){.bits = (uint32_t)*from << 16}).value;
}
INLINE Halves narrow(Vec x) {
#if defined __AVX512BF16__ && defined __AVX512VL__
  return (Halves)_mm256_cvtneps_pbh((__m256)x);
#else
  Words bits = (Words)x, broken = (Words)(x != x), even = bits >> 16 & 1;
  Words rounded = ((bits + even + 0x7fff) & ~broken) | ((bits | 0x400000) & broken);
  return __builtin_convertvector(rounded >> 16, Halves);
#endif
}
INLINE void write_Vec(Map *to, Vec x) { SET(Halves, to) = narrow(x); }
INLINE void write_One(Map *to, REAL x) { *to = narrow((Vec){0} + x)[0]; }
#elif defined FLOAT16
typedef uint16_t Map;
typedef __m128i Unaligned __attribute__((aligned(2), may_alias));
INLINE Vec read_Vec(const Map *from) { return (Vec)_mm256_cvtph_ps(AT(Unaligned, from)); }
INLINE REAL read_One(const Map *from) { return _cvtsh_ss(*from); }
INLINE void write_Vec(Map *to, Vec x) { SET(Unaligned, to) = _mm256_cvtps_ph((__m256)x, 0); }
INLINE void write_One(Map *to, REAL x) { *to = _cvtss_sh(x, 0); }
#else
typedef REAL Map;
INLINE Vec read_Vec(const Map *from) { return LOAD(from); }
INLINE REAL read_One(const Map *from) { return *from; }
INLINE void write_Vec(Map *to, Vec x) { STORE(to) = x; }
INLINE void write_One(Map *to, REAL x) { *to = x; }
#endif

/* Twice as many lanes where registers are as wide. */
#ifdef __AVX512F__
typedef REAL Wide __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));
#if defined BFLOAT16
typedef uint16_t WideHalves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t WideWords __attribute__((vector_size(64), aligned(4), may_alias));
INLINE Wide read_Wide(const Map *from) {
  return (Wide)(__builtin_convertvector(AT(WideHalves, from), WideWords) << 16);
}
INLINE WideHalves narrow_Wide(Wide x) {
#ifdef __AVX512BF16__
  return (WideHalves)_mm512_cvtneps_pbh((__m512)x);
#else
  WideWords bits = (WideWords)x, broken = (WideWords)(x != x), even = bits >> 16 & 1;
  WideWords rounded = ((bits + even + 0x7fff) & ~broken) | ((bits | 0x400000) & broken);
  return __builtin_convertvector(rounded >> 16, WideHalves);
#endif
}
INLINE void write_Wide(Map *to, Wide x) { SET(WideHalves, to) = narrow_Wide(x); }
#elif defined FLOAT16
typedef __m256i WideUnaligned __attribute__((aligned(2), may_alias));
INLINE Wide read_Wide(const Map *from) { return (Wide)_mm512_cvtph_ps(AT(WideUnaligned, from)); }
INLINE void write_Wide(Map *to, Wide x) { SET(WideUnaligned, to) = _mm512_cvtps_ph((__m512)x, 0); }
#else
INLINE Wide read_Wide(const Map *from) { return AT(Wide, from); }
INLINE void write_Wide(Map *to, Wide x) { SET(Wide, to) = x; }
#endif
#else
typedef Vec Wide;
#define read_Wide read_Vec
#define write_Wide write_Vec
#endif
#define SPAN ((I)(sizeof(Wide) / sizeof(REAL)))

/* n elements of a map times scale, and back; a row of REAL may hold fewer elements than vectors. */
INLINE void read_row(const Map *from, REAL *to, I n, REAL scale) {
  I i = 0;
  for (; i + SPAN <= n; i += SPAN) SET(Wide, to + i) = READ(Wide, from + i) * scale;
  for (; i + LANES <= n; i += LANES) STORE(to + i) = READ(Vec, from + i) * scale;
  for (; i < n; i++) to[i] = READ(One, from + i) * scale;
}
INLINE void write_row(const REAL *from, Map *to, I n, REAL scale) {
  I i = 0;
  for (; i + SPAN <= n; i += SPAN) WRITE(Wide, to + i, AT(Wide, from + i) * scale);
  for (; i + LANES <= n; i += LANES) WRITE(Vec, to + i, LOAD(from + i) * scale);
  for (; i < n; i++) WRITE(One, to + i, from[i] * scale);
}

/* Rows of a tile of J vectors: its accumulators fill the vector registers. */
#ifdef __AVX512VL__
#define ROWS_OF(J) (J > 3 ? 6 : J > 2 ? 8 : 12)
#else
#define ROWS_OF(J) (J > 3 ? 3 : J > 2 ? 4 : 6)
#endif
#define ROWS ROWS_OF(4)

/* malloc for vectors: one that lies in two lines of the cache takes two loads. */
#ifndef allocate
INLINE void *allocate(I bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }
#endif

INLINE I least(I a, I b) { return a < b ? a : b; }
INLINE I most(I a, I b) { return a > b ? a : b; }
INLINE I padded(I n) { return (n + LANES - 1) / LANES * LANES; }

/* 1 / n! */
static const REAL FACTORS[] = {1,           1,           1. / 2,       1. / 6,        1. / 24,
                               1. / 120,    1. / 720,    1. / 5040,    1. / 40320,    1. / 362880,
                               1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};

/* exp(x) for x <= 0: zero where the result would be denormal, NaN for NaN. */
#define EXPONENTIAL(T)                                                                            \
  INLINE T exponential_##T(T x) {                                                                 \
    const int single = sizeof(REAL) == 4, degree = single ? 7 : 13;                               \
    const REAL low = single ? -87 : -708, magic = single ? 12582912.0 : 6755399441055744.0;       \
    /* ln 2 = high + rest; high has few enough bits for n * high to be exact. */                  \
    const REAL high = 0.693145751953125, rest = 1.42860682030941723212e-6;                        \
    T##Bits normal = x > low, broken = (T##Bits)x & (x != x);                                     \
    x = (T)((T##Bits)x & normal);                                                                 \
    T n = x * (REAL)1.44269504088896340736 + magic;                                               \
    Bits shift = single ? 23 : 52, bias = single ? 127 : 1023;                                    \
    T##Bits power = ((T##Bits)n - (T##Bits)((T){0} + magic) + bias) << shift;                     \
    n -= magic;                                                                                   \
    T r = x - n * high - n * rest, sum = (T){0} + FACTORS[degree];                                \
    for (int i = degree; i > 0; i--) sum = sum * r + FACTORS[i - 1];                              \
    return (T)(((T##Bits)(sum * (T)power) & normal) | broken);                                    \
  }
EXPONENTIAL(Vec)
#ifdef __AVX512F__
typedef Bits WideBits __attribute__((vector_size(64)));
EXPONENTIAL(Wide)
#else
#define exponential_Wide exponential_Vec
#endif

/* Softmax of a row of n numbers, a multiple of LANES; the largest is not -infinity. */
INLINE void softmax(REAL *row, I n) {
  REAL largest = -INFINITY, total = 0;
  Vec top = LOAD(row), sum = {0};
  Wide sums = {0};
  I m = LANES;
  for (; m < n; m += LANES) {
    Vec next = LOAD(row + m);
    VecBits more = next > top;
    top = (Vec)(((VecBits)next & more) | ((VecBits)top & ~more));
  }
  for (I i = 0; i < LANES; i++) largest = top[i] > largest ? top[i] : largest;
  for (m = 0; m + SPAN <= n; m += SPAN) {
    Wide weight = exponential_Wide(AT(Wide, row + m) - largest);
    SET(Wide, row + m) = weight;
    sums += weight;
  }
  for (; m < n; m += LANES) {
    Vec weight = exponential_Vec(LOAD(row + m) - largest);
    STORE(row + m) = weight;
    sum += weight;
  }
  for (I i = 0; i < SPAN; i++) total += sums[i];
  for (I i = 0; i < LANES; i++) total += sum[i];
  for (m = 0; m < n; m += LANES) STORE(row + m) *= 1 / total;
}

/* multiply: products of REAL. */
#define ELEMENT REAL
#define ELEMENTS(T) T
#define NAME(name) name
#define PLUS_TIMES(T, sum, a, b) sum + a * b
#include "product.h"
