/* Products of small matrices, included once for each type of their elements, ELEMENT; ELEMENTS(T) is
   a vector of as many of them as T has of REAL, PLUS_TIMES adds a product to such a vector of sums. */

/* A tile of R rows and J vectors of out = a @ b + start, or out += if `more`. Element (r, k) of a
   is a[r * ar + k * ak]; bk and outr are the row strides of b and out; start is a row or NULL. */
#define TILE(T)                                                                                   \
  INLINE void NAME(tile_##T)(const ELEMENT *a, I ar, I ak, const ELEMENT *b, I bk, REAL *out,     \
                             I outr, I K, int more, const REAL *start, const int R, const int J) { \
    const I lanes = sizeof(T) / sizeof(REAL);                                                     \
    T sum[ROWS_OF(1)][4];                                                                         \
    for (int r = 0; r < R; r++)                                                                   \
      for (int j = 0; j < J; j++) {                                                               \
        sum[r][j] = more ? AT(T, out + r * outr + j * lanes) : (T){0};                            \
        if (start) sum[r][j] += AT(T, start + j * lanes);                                         \
      }                                                                                           \
    for (I k = 0; k < K; k++) {                                                                   \
      ELEMENTS(T) from[4];                                                                        \
      for (int j = 0; j < J; j++) from[j] = AT(ELEMENTS(T), b + k * bk + j * lanes);              \
      for (int r = 0; r < R; r++) {                                                               \
        ELEMENT value = a[r * ar + k * ak];                                                       \
        for (int j = 0; j < J; j++) sum[r][j] = PLUS_TIMES(T, sum[r][j], value, from[j]);         \
      }                                                                                           \
    }                                                                                             \
    for (int r = 0; r < R; r++)                                                                   \
      for (int j = 0; j < J; j++) SET(T, out + r * outr + j * lanes) = sum[r][j];                 \
  }
TILE(Vec)
TILE(Wide)
#undef TILE

#define TILE_ROWS(T, J)                                                                           \
  static __attribute__((unused)) void NAME(rows_##T##_##J)(                                       \
      const ELEMENT *a, I ar, I ak, const ELEMENT *b, I bk, REAL *out, I outr, I M, I K, int more,  \
      const REAL *start) {                                                                        \
    I r = 0;                                                                                      \
    for (; r + ROWS_OF(J) <= M; r += ROWS_OF(J))                                                  \
      NAME(tile_##T)(a + r * ar, ar, ak, b, bk, out + r * outr, outr, K, more, start, ROWS_OF(J), J); \
    for (; r + 4 <= M; r += 4)                                                                    \
      NAME(tile_##T)(a + r * ar, ar, ak, b, bk, out + r * outr, outr, K, more, start, 4, J);      \
    for (; r + 2 <= M; r += 2)                                                                    \
      NAME(tile_##T)(a + r * ar, ar, ak, b, bk, out + r * outr, outr, K, more, start, 2, J);      \
    for (; r < M; r++)                                                                            \
      NAME(tile_##T)(a + r * ar, ar, ak, b, bk, out + r * outr, outr, K, more, start, 1, J);      \
  }
TILE_ROWS(Vec, 1)
TILE_ROWS(Wide, 1)
TILE_ROWS(Wide, 2)
TILE_ROWS(Wide, 3)
TILE_ROWS(Wide, 4)
#undef TILE_ROWS

/* The same for all of (M, K) @ (K, width); the width is a multiple of LANES. */
INLINE void NAME(multiply_from)(const ELEMENT *a, I ar, I ak, const ELEMENT *b, I bk, REAL *out, I outr,
                                I width, I M, I K, int more, const REAL *start) {
  I j = 0, left;
  for (; (left = least(4, (width - j) / SPAN)) > 0; j += left * SPAN) {
    const REAL *from = start ? start + j : start;
    if (left == 4) NAME(rows_Wide_4)(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
    if (left == 3) NAME(rows_Wide_3)(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
    if (left == 2) NAME(rows_Wide_2)(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
    if (left == 1) NAME(rows_Wide_1)(a, ar, ak, b + j, bk, out + j, outr, M, K, more, from);
  }
  if (j < width)
    NAME(rows_Vec_1)(a, ar, ak, b + j, bk, out + j, outr, M, K, more, start ? start + j : start);
}
INLINE void NAME(multiply)(const ELEMENT *a, I ar, I ak, const ELEMENT *b, I bk, REAL *out, I outr,
                           I width, I M, I K, int more) {
  NAME(multiply_from)(a, ar, ak, b, bk, out, outr, width, M, K, more, 0);
}
#undef ELEMENT
#undef ELEMENTS
#undef NAME
#undef PLUS_TIMES
