/* Products of small matrices, included once for each type of their elements, ELEMENT; ELEMENTS is a
   vector of LANES of them, PLUS_TIMES adds a product, in REAL, to a vector of sums. */

/* A tile of R rows and J vectors of out = a @ b + start, or out += if `more`. Element (r, k) of a
   is a[r * ar + k * ak]; bk and outr are the row strides of b and out; start is a row or NULL. */
INLINE void NAME(tile)(const ELEMENT *a, I ar, I ak, const ELEMENT *b, I bk, REAL *out, I outr, I K,
                       int more, const REAL *start, const int R, const int J) {
  Vec sum[ROWS][4];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) {
      sum[r][j] = more ? LOAD(out + r * outr + j * LANES) : (Vec){0};
      if (start) sum[r][j] += LOAD(start + j * LANES);
    }
  for (I k = 0; k < K; k++) {
    ELEMENTS from[4];
    for (int j = 0; j < J; j++) from[j] = AT(ELEMENTS, b + k * bk + j * LANES);
    for (int r = 0; r < R; r++) {
      ELEMENT value = a[r * ar + k * ak];
      for (int j = 0; j < J; j++) sum[r][j] = PLUS_TIMES(sum[r][j], value, from[j]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) STORE(out + r * outr + j * LANES) = sum[r][j];
}

#define TILE_ROWS(J)                                                                              \
  static __attribute__((unused)) void NAME(tile_rows_##J)(                                        \
      const ELEMENT *a, I ar, I ak, const ELEMENT *b, I bk, REAL *out, I outr, I M, I K, int more,  \
      const REAL *start) {                                                                        \
    I r = 0;                                                                                      \
    for (; r + ROWS <= M; r += ROWS)                                                              \
      NAME(tile)(a + r * ar, ar, ak, b, bk, out + r * outr, outr, K, more, start, ROWS, J);       \
    for (; r + 2 <= M; r += 2)                                                                    \
      NAME(tile)(a + r * ar, ar, ak, b, bk, out + r * outr, outr, K, more, start, 2, J);          \
    for (; r < M; r++)                                                                            \
      NAME(tile)(a + r * ar, ar, ak, b, bk, out + r * outr, outr, K, more, start, 1, J);          \
  }
TILE_ROWS(1)
TILE_ROWS(2)
TILE_ROWS(3)
TILE_ROWS(4)
#undef TILE_ROWS

/* The same for all of (M, K) @ (K, width); the width is a multiple of LANES. */
INLINE void NAME(multiply_from)(const ELEMENT *a, I ar, I ak, const ELEMENT *b, I bk, REAL *out, I outr,
                                I width, I M, I K, int more, const REAL *start) {
  I j = 0;
  for (; j < width; j += 4 * LANES) {
    I left = least(4, (width - j) / LANES);
    const REAL *from = start ? start + j : start;
    if (left == 4) NAME(tile_rows_4)(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
    if (left == 3) NAME(tile_rows_3)(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
    if (left == 2) NAME(tile_rows_2)(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
    if (left == 1) NAME(tile_rows_1)(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
  }
}
INLINE void NAME(multiply)(const ELEMENT *a, I ar, I ak, const ELEMENT *b, I bk, REAL *out, I outr,
                           I width, I M, I K, int more) {
  NAME(multiply_from)(a, ar, ak, b, bk, out, outr, width, M, K, more, 0);
}
#undef ELEMENT
#undef ELEMENTS
#undef NAME
#undef PLUS_TIMES
