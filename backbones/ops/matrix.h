/* SIMD vectors of 32 bytes, and products of small matrices whose rows are padded to whole vectors.
   REAL is float or double. */

#include <math.h>
#include <stdint.h>

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

/* Rows of a tile: its accumulators fill the vector registers. */
#ifdef __AVX512VL__
#define ROWS 6
#else
#define ROWS 3
#endif

INLINE I least(I a, I b) { return a < b ? a : b; }
INLINE I most(I a, I b) { return a > b ? a : b; }
INLINE I padded(I n) { return (n + LANES - 1) / LANES * LANES; }

/* 1 / n! */
static const REAL FACTORS[] = {1,           1,           1. / 2,       1. / 6,        1. / 24,
                               1. / 120,    1. / 720,    1. / 5040,    1. / 40320,    1. / 362880,
                               1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};

/* exp(x) for x <= 0: zero where the result would be denormal, NaN for NaN. */
INLINE Vec exponential(Vec x) {
  const int single = sizeof(REAL) == 4, degree = single ? 7 : 13;
  const REAL low = single ? -87 : -708, magic = single ? 12582912.0 : 6755399441055744.0;
  /* ln 2 = high + rest; high has few enough bits for n * high to be exact. */
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

/* Softmax of a row of n numbers, a multiple of LANES; the largest is not -infinity. */
INLINE void softmax(REAL *row, I n) {
  REAL largest = -INFINITY, total = 0;
  Vec top = LOAD(row), sum = {0};
  for (I m = LANES; m < n; m += LANES) {
    Vec next = LOAD(row + m);
    VecBits more = next > top;
    top = (Vec)(((VecBits)next & more) | ((VecBits)top & ~more));
  }
  for (I i = 0; i < LANES; i++) largest = top[i] > largest ? top[i] : largest;
  for (I m = 0; m < n; m += LANES) {
    Vec weight = exponential(LOAD(row + m) - largest);
    STORE(row + m) = weight;
    sum += weight;
  }
  for (I i = 0; i < LANES; i++) total += sum[i];
  for (I m = 0; m < n; m += LANES) STORE(row + m) *= 1 / total;
}

/* A tile of R rows and J vectors of out = a @ b + start, or out += if `more`. Element (r, k) of a
   is a[r * ar + k * ak]; bk and outr are the row strides of b and out; start is a row or NULL. */
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

/* The same for all of (M, K) @ (K, width); the width is a multiple of LANES. */
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
