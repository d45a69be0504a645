/* The second half of a block, compiled by backbones.ops.native: y + MLP(norm(y)), where y is x or
   x + linear(relu(mixed)).

   Rows are positions. A thread computes some of them from start to end, so that all between stays
   in its core's cache. A weight (D, K) is panels of 64 of its D columns, (D / 64, K, 64), padded
   with zeros as biases are; pairs of K are joined where Factors are pairs. The order of sums does
   not depend on the number of threads: results are bitwise reproducible. */

#include "factors.h"

#include <string.h>

/* Columns of a panel; hidden channels at a time; terms of sums at a time, whose part of a panel
   stays in the cache for all rows; most rows at a time. */
#define WIDTH ((I)64)
#define HIDDEN ((I)128)
#define TERMS ((I)128)
#define TOGETHER ((I)104)

#ifndef __AVX512F__
typedef VecBits WideBits;
#endif
#define WHERE(T, mask, yes, no) ((T)(((T##Bits)(yes) & (mask)) | ((T##Bits)(no) & ~(mask))))
/* Phi(x) - 1/2 = x P(x * x) / Q(x * x), fitted for |x| < 5.4, where the distance to 1/2 ends. */
static const REAL P[] = {2.282550714e-08, 6.448980632e-06, 1.736979413e-04,
                         4.707448080e-03, 3.426380487e-02, 3.989421766e-01};
static const REAL Q[] = {1.206891754e-06, 7.554613714e-05, 1.911597055e-03,
                         2.889424697e-02, 2.525518030e-01, 1};
/* x * Phi(x): in float by the fraction, within 3e-7 * x, in double by the C library. */
#define GELU(T)                                                                                   \
  INLINE T gelu_##T(T x) {                                                                        \
    if (sizeof(REAL) == 8) {                                                                      \
      for (I i = 0; i < (I)(sizeof(T) / sizeof(REAL)); i++)                                       \
        x[i] *= (REAL)0.5 * (1 + erf(x[i] * (REAL)0.70710678118654752440));                       \
      return x;                                                                                   \
    }                                                                                             \
    T half = (T){0} + (REAL)0.5, last = (T){0} + (REAL)29.16, z = x * x;                          \
    z = WHERE(T, z < last, z, last);                                                              \
    T above = (T){0} + P[0], below = (T){0} + Q[0];                                               \
    for (int i = 1; i < 6; i++) above = above * z + P[i], below = below * z + Q[i];               \
    T part = x * above / below;                                                                   \
    part = WHERE(T, part > half, half, part);                                                     \
    part = WHERE(T, part < -half, -half, part);                                                   \
    return x * (part + half);                                                                     \
  }
GELU(Vec)
GELU(Wide)

/* Rows of REAL, padded to whole vectors, as factors. */
INLINE void join_row(const REAL *from, Factor *to, I width) {
#if PAIR == 1
  memcpy(to, from, width * sizeof(REAL));
#else
  write_row(from, (Map *)to, width, 1);
#endif
}
INLINE void activate(REAL *row, Factor *to, I width) {
  I i = 0;
  for (; i + SPAN <= width; i += SPAN) SET(Wide, row + i) = gelu_Wide(AT(Wide, row + i));
  for (; i < width; i += LANES) STORE(row + i) = gelu_Vec(LOAD(row + i));
  join_row(row, to, width);
}
INLINE void rectify(REAL *row, I n) {
  for (I i = 0; i < n; i++) row[i] = row[i] < 0 ? 0 : row[i];
}
INLINE void normalise(const REAL *row, REAL *to, I n, REAL epsilon) {
  Wide sums = {0}, squares = {0};
  REAL mean = 0, variance = 0;
  I i = 0;
  for (; i + SPAN <= n; i += SPAN) sums += AT(Wide, row + i);
  for (; i < n; i++) mean += row[i];
  for (I j = 0; j < SPAN; j++) mean += sums[j];
  mean /= n;
  for (i = 0; i + SPAN <= n; i += SPAN) {
    Wide from = AT(Wide, row + i) - mean;
    squares += from * from;
  }
  for (; i < n; i++) variance += (row[i] - mean) * (row[i] - mean);
  for (I j = 0; j < SPAN; j++) variance += squares[j];
  REAL scale = 1 / (REAL)sqrt(variance / n + epsilon);
  for (i = 0; i + SPAN <= n; i += SPAN) SET(Wide, to + i) = (AT(Wide, row + i) - mean) * scale;
  for (; i < n; i++) to[i] = (row[i] - mean) * scale;
}

/* out (rows, D) = start + a @ panels, or out += the same; panels have `depth` rows, of which the K
   at the pointer are meant. */
static void product(const Factor *a, I ar, const Factor *panels, I depth, REAL *out, I outr, I rows,
                    I K, I D, int more, const REAL *start) {
  for (I d = 0; d < D; d += WIDTH, panels += depth * WIDTH)
    for (I k = 0; k < K; k += TERMS)
      multiply_from_factors(a + k, ar, 1, panels + k * WIDTH, WIDTH, out + d, outr,
                            padded(least(WIDTH, D - d)), rows, least(TERMS, K - k), more || k,
                            k || !start ? 0 : start + d);
}

/* x, mixed and out (N, C), the MLP with H hidden channels. No linear of mixed if `project` is NULL,
   no norm if `epsilon` is; the norm's weight and bias are part of the first linear's. out may be x
   or mixed. Returns 1 if memory runs out. */
int residual_mlp(const Map *x, const Map *mixed, Map *out, const REAL *project, const REAL *offset,
                 const REAL *first, const REAL *bias1, const REAL *second, const REAL *bias2,
                 const REAL *epsilon, I N, I C, I H, I threads) {
  I width = padded(C), K = halved(C), depth = halved(H), stride = width / PAIR;
  /* Even numbers, as a product's last row of an odd one may be rounded otherwise. */
  I part = (N + 2 * threads - 1) / (2 * threads) * 2;
  I steps = most(1, (part + TOGETHER - 1) / TOGETHER);
  I step = (part + 2 * steps - 1) / (2 * steps) * 2;
  I size = step * (2 * width + 2 * HIDDEN) + width;
  REAL *space = allocate(threads * size * sizeof(REAL));
  if (!space) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (I thread = 0; thread < threads; thread++) {
    REAL *y = space + thread * size, *hidden = y + step * width, *row = hidden + step * HIDDEN;
    Factor *given = (Factor *)(row + width), *activated = given + step * width;
    I end = least(N, (thread + 1) * part);
    for (I start = thread * part; start < end; start += step) {
      I rows = least(step, end - start);
      memset(y, 0, rows * width * sizeof(REAL));
      memset(row, 0, width * sizeof(REAL));
      for (I r = 0; r < rows; r++) {
        read_row(x + (start + r) * C, y + r * width, C, 1);
        if (project) {
          read_row(mixed + (start + r) * C, row, C, 1);
          rectify(row, C);
          join_row(row, given + r * stride, width);
        }
      }
      if (project)
        product(given, stride, (const Factor *)project, K, y, width, rows, K, C, 1, offset);
      for (I r = 0; r < rows; r++) {
        if (epsilon) normalise(y + r * width, row, C, *epsilon);
        join_row(epsilon ? row : y + r * width, given + r * stride, width);
      }
      for (I h = 0; h < H; h += HIDDEN) {
        I some = least(HIDDEN, H - h), whole = padded(some);
        product(given, stride, (const Factor *)first + h * K, K, hidden, HIDDEN, rows, K, some, 0,
                bias1 + h);
        for (I r = 0; r < rows; r++)
          activate(hidden + r * HIDDEN, activated + r * (HIDDEN / PAIR), whole);
        product(activated, HIDDEN / PAIR, (const Factor *)second + h / PAIR * WIDTH, depth, y, width,
                rows, halved(some), C, 1, h ? 0 : bias2);
      }
      for (I r = 0; r < rows; r++) write_row(y + r * width, out + (start + r) * C, C, 1);
    }
  }
  free(space);
  return 0;
}

/* How many numbers of a sum are one Factor. */
int factor(void) { return PAIR; }
