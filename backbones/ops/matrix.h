/* Vectors, and products of small matrices whose rows lie in whole ones. REAL is float or double. */

#include <stdint.h>

typedef int64_t I;
typedef REAL Vec __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
#define LANES ((I)(32 / sizeof(REAL)))
typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 4, (int32_t)0, (int64_t)0)) Bits;
typedef Bits VecBits __attribute__((vector_size(32)));
/* Macros make every loop twice: of whole vectors and, for what is left over, of single numbers. */
typedef REAL One;
#define AT(T, pointer) (*(const T *)(pointer))
#define SET(T, pointer) (*(T *)(pointer))
#define INLINE static inline __attribute__((always_inline))
#define LOAD(pointer) AT(Vec, pointer)
#define STORE(pointer) SET(Vec, pointer)

/* As many sums as there are registers for. */
#ifdef __AVX512VL__
#define ROWS 6
#else
#define ROWS 3
#endif

INLINE I least(I a, I b) { return a < b ? a : b; }
INLINE I most(I a, I b) { return a > b ? a : b; }

/* 1 / n! */
static const REAL FACTORS[] = {1,           1,           1. / 2,       1. / 6,        1. / 24,
                               1. / 120,    1. / 720,    1. / 5040,    1. / 40320,    1. / 362880,
                               1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};

/* exp of what is not positive, zero where the result would be denormal, NaN of NaN. */
INLINE Vec exponential(Vec x) {
  const int single = sizeof(REAL) == 4, degree = single ? 7 : 13;
  const REAL low = single ? -87 : -708, magic = single ? 12582912.0 : 6755399441055744.0;
  /* ln 2 in two parts, the first of few enough bits for n times it to be exact. */
  const REAL high = 0.693145751953125, rest = 1.42860682030941723212e-6;
  VecBits normal = x > low, broken = (VecBits)x & (x != x);
  x = (Vec)((VecBits)x & normal);
  Vec n = x * (REAL)1.44269504088896340736 + magic;
  Bits shift = single ? 23 : 52, bias = single ? 127 : 1023;
  VecBits power = ((VecBits)n - (VecBits)((Vec){0} + magic) + bias) << shift;
  n -= magic;
  Vec r = x - n * high - n * rest, sum = (Vec){0} + FACTORS[degree];
  for (int i = degree; i > 0; i--) sum = sum * r + FACTORS[i - 1];
  return (Vec)(((VecBits)(sum * (Vec)power) & normal) | broken);
}

/* A tile of out (+)= a @ b: R rows, J vectors. Element (r, k) of a is a[r * ar + k * ak], rows of b
   and out are bk and outr apart; start is added to every row unless it is NULL. */
INLINE void tile(const REAL *a, I ar, I ak, const REAL *b, I bk, REAL *out, I outr, I K, int more,
                 const REAL *start, const int R, const int J) {
  Vec sum[ROWS][4];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) {
      sum[r][j] = more ? LOAD(out + r * outr + j * LANES) : (Vec){0};
      if (start) sum[r][j] += LOAD(start + j * LANES);
    }
  for (I k = 0; k < K; k++) {
    Vec from[4];
    for (int j = 0; j < J; j++) from[j] = LOAD(b + k * bk + j * LANES);
    for (int r = 0; r < R; r++) {
      REAL value = a[r * ar + k * ak];
      for (int j = 0; j < J; j++) sum[r][j] += value * from[j];
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) STORE(out + r * outr + j * LANES) = sum[r][j];
}

#define TILE_ROWS(J)                                                                              \
  static __attribute__((unused)) void tile_rows_##J(const REAL *a, I ar, I ak, const REAL *b, I bk, \
                                                    REAL *out, I outr, I M, I K, int more,        \
                                                    const REAL *start) {                          \
    I r = 0;                                                                                      \
    for (; r + ROWS <= M; r += ROWS)                                                              \
      tile(a + r * ar, ar, ak, b, bk, out + r * outr, outr, K, more, start, ROWS, J);             \
    for (; r + 2 <= M; r += 2)                                                                    \
      tile(a + r * ar, ar, ak, b, bk, out + r * outr, outr, K, more, start, 2, J);                \
    for (; r < M; r++)                                                                            \
      tile(a + r * ar, ar, ak, b, bk, out + r * outr, outr, K, more, start, 1, J);                \
  }
TILE_ROWS(1)
TILE_ROWS(2)
TILE_ROWS(3)
TILE_ROWS(4)

/* out (+)= a @ b + start, (M, K) by (K, width), the width in whole vectors. */
INLINE void multiply_from(const REAL *a, I ar, I ak, const REAL *b, I bk, REAL *out, I outr, I width,
                          I M, I K, int more, const REAL *start) {
  I j = 0;
  for (; j < width; j += 4 * LANES) {
    I left = least(4, (width - j) / LANES);
    const REAL *from = start ? start + j : start;
    if (left == 4) tile_rows_4(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
    if (left == 3) tile_rows_3(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
    if (left == 2) tile_rows_2(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
    if (left == 1) tile_rows_1(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
  }
}
INLINE void multiply(const REAL *a, I ar, I ak, const REAL *b, I bk, REAL *out, I outr, I width, I M,
                     I K, int more) {
  multiply_from(a, ar, ak, b, bk, out, outr, width, M, K, more, 0);
}
