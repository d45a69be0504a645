/* Products of maps' numbers with sums in REAL: multiply_factors, multiply_from_factors. Where the
   processor multiplies pairs of bfloat16 numbers, two neighbours of a sum are one Factor. */

#include "matrix.h"

#if defined BFLOAT16 && defined __AVX512BF16__ && defined __AVX512VL__
#define PAIR 2
typedef uint32_t Factor;
#define ELEMENT Factor
typedef Words PairsVec;
typedef WideWords PairsWide;
INLINE Vec plus_Vec(Vec sum, Words a, Words b) {
  return (Vec)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
}
INLINE Wide plus_Wide(Wide sum, WideWords a, WideWords b) {
  return (Wide)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#define ELEMENTS(T) Pairs##T
#define NAME(name) name##_factors
#define PLUS_TIMES(T, sum, a, b) plus_##T(sum, (Pairs##T){0} + a, b)
#include "product.h"
INLINE Words join(Vec a, Vec b) {
  return __builtin_convertvector(narrow(a), Words) | __builtin_convertvector(narrow(b), Words) << 16;
}
INLINE WideWords join_Wide(Wide a, Wide b) {
  return __builtin_convertvector(narrow_Wide(a), WideWords) |
         __builtin_convertvector(narrow_Wide(b), WideWords) << 16;
}
#else
#define PAIR 1
typedef REAL Factor;
#define multiply_factors multiply
#define multiply_from_factors multiply_from
INLINE Vec join(Vec a, Vec b) { return a; }
#endif
INLINE I halved(I n) { return (n + PAIR - 1) / PAIR; }
