/* What oneDNN's products need beside them, built by native.py. */

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
