/* What oneDNN's products need beside them, built by native.py. */

#include <math.h>
#include <string.h>

#include "matrix.h"

/* Sides of the squares that are turned at a time: a cache line of numbers. */
#define SIDE ((I)(64 / sizeof(REAL)))

/* (rows, columns) to (columns, rows). */
I transposed(const REAL *x, REAL *out, I rows, I columns, I threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (I top = 0; top < rows; top += SIDE)
    for (I left = 0; left < columns; left += SIDE)
      for (I j = left; j < least(left + SIDE, columns); j++)
        for (I i = top; i < least(top + SIDE, rows); i++) out[j * rows + i] = x[i * columns + j];
  return 0;
}

/* Phi(-a) exp(a^2 / 2) of a in [0, 14] by powers of t = 1 / (1 + a * BEND), over t, fitted to
   4e-9 of it by least squares at the Chebyshev nodes of t. */
#define BEND (REAL)0.3
static const REAL TAIL[] = {0.119687407,   0.119557241, 0.110361191,  0.0777838584, 0.0979556973,
                            -0.0828475505, 0.195974185, -0.231400286, 0.113806516,  -0.0208782614};

/* The normal distribution below x, and its density there. */
INLINE void normal(Vec x, Vec *below, Vec *density) {
  VecBits negative = x < 0;
  Vec a = (Vec)((negative & (VecBits)-x) | (~negative & (VecBits)x));
  Vec e = exponential(a * a * (REAL)-0.5), tail;
  if (sizeof(REAL) == 4) {
    Vec t = 1 / (1 + a * BEND);
    tail = (Vec){0} + TAIL[9];
    for (int i = 8; i >= 0; i--) tail = tail * t + TAIL[i];
    tail *= t * e;
  } else {
    for (I i = 0; i < LANES; i++) tail[i] = 0.5 * erfc(a[i] * 0.707106781186547524);
  }
  *below = (Vec)((negative & (VecBits)tail) | (~negative & (VecBits)(1 - tail)));
  *density = e * (REAL)0.398942280401432678;
}

/* A vector of both at x: GELU of x, and its gradient from the gradient of what follows. */
INLINE void gelu_at(const REAL *x, REAL *grad, REAL *out) {
  Vec at = LOAD(x), below, density;
  normal(at, &below, &density);
  STORE(grad) = LOAD(grad) * (below + at * density);
  STORE(out) = at * below;
}

/* out is GELU of x; grad, its gradient, becomes that of x. */
I gelu_backward(const REAL *x, REAL *grad, REAL *out, I count, I threads) {
  I whole = count - count % LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (I i = 0; i < whole; i += LANES) gelu_at(x + i, grad + i, out + i);
  if (whole < count) {
    REAL rest[3][LANES] = {0};
    I size = (count - whole) * sizeof(REAL);
    memcpy(rest[0], x + whole, size);
    memcpy(rest[1], grad + whole, size);
    gelu_at(rest[0], rest[1], rest[2]);
    memcpy(grad + whole, rest[1], size);
    memcpy(out + whole, rest[2], size);
  }
  return 0;
}
