/* Sliding attention: each position attends to the window centred at it, without the positions
   outside of the map. Compiled by backbones.ops.native.

   Work is divided into strips of rows of one head of one image. A strip goes down its rows and holds
   those of a window's height: the keys transposed, (D, width), so that the keys of a query's window
   row are adjacent, and the values, (width, Dp). Nothing else is stored but one row's attention
   weights, (W, N). Sums have an order that depends on shapes alone: results are bitwise reproducible
   on any number of threads.

   Shared arguments: heads of D channels; windows of rows x columns positions, both odd. Functions
   return 1 if memory runs out. */

#include "matrix.h"

#include <string.h>

/* Dp, Kp: D and columns padded to whole vectors; N: weights of a query, rows * Kp; up and left: from
   the centre of a window to its border; Wp: positions of a row with left on both sides; width: of a
   transposed row, an odd number of vectors, since cache lines a power of two apart evict each other. */
typedef struct {
  I B, H, W, heads, D, rows, columns, C, Dp, Kp, N, up, left, Wp, width;
} Slide;

static Slide slide(I B, I H, I W, I heads, I D, I rows, I columns) {
  I Kp = padded(columns), up = rows / 2, left = columns / 2;
  return (Slide){B, H, W, heads, D, rows, columns, heads * D, padded(D), Kp, rows * Kp,
                 up, left, W + 2 * left, padded(W + Kp) | LANES};
}

/* Rows from a strip's first to the next strip's. */
INLINE I start_of(const Slide *s, I strip, I strips) { return s->H * strip / strips; }

/* One head of a row of a map with `channels` channels, to (W, Dp), and back. */
INLINE void gather(const Slide *s, const Map *map, I channels, REAL *to, REAL scale) {
  for (I x = 0; x < s->W; x++) read_row(map + x * channels, to + x * s->Dp, s->D, scale);
}
INLINE void scatter(const Slide *s, const REAL *from, Map *map, I channels, REAL scale) {
  for (I x = 0; x < s->W; x++) write_row(from + x * s->Dp, map + x * channels, s->D, scale);
}
INLINE void add(const Slide *s, const REAL *from, Map *map, I channels) {
  for (I x = 0; x < s->W; x++, map += channels, from += s->Dp)
    for (I d = 0; d < s->D; d++) WRITE(One, map + d, READ(One, map + d) + from[d]);
}

/* The same, transposed: (D, width), from column `left` on. */
INLINE void turn(const Slide *s, const Map *map, I channels, REAL *to) {
  for (I x = 0; x < s->W; x++)
    for (I d = 0; d < s->D; d++) to[d * s->width + s->left + x] = READ(One, map + x * channels + d);
}

/* (heads, N): the bias in whole vectors; behind it (W, Kp): for the query of each column, all
   bits set for the columns of its window that are inside of the map. */
static REAL *table_of(const Slide *s, const REAL *bias, const REAL **seen) {
  REAL *table = calloc(s->heads * s->N + s->W * s->Kp, sizeof(REAL));
  if (!table) return table;
  for (I i = 0; i < s->heads * s->rows; i++)
    memcpy(table + i * s->Kp, bias + i * s->columns, s->columns * sizeof(REAL));
  REAL *inside = table + s->heads * s->N;
  for (I x = 0; x < s->W; x++) {
    I first = most(0, s->left - x), last = least(s->columns, s->W - x + s->left);
    memset(inside + x * s->Kp + first, 255, (last - first) * sizeof(REAL));
  }
  *seen = inside;
  return table;
}

/* to[r] = start[r] + sum over d of query[d] * turned[r][d * width], vectors for R <= 7 rows of keys. */
INLINE void dots(const REAL *query, I D, REAL *const *turned, I at, I width, const REAL *start,
                 REAL *to, I Kp, const int R) {
  const REAL *from[7];
  Vec sum[7];
  for (int r = 0; r < R; r++) from[r] = turned[r] + at;
  for (int r = 0; r < R; r++) sum[r] = start ? LOAD(start + r * Kp) : (Vec){0};
  for (I d = 0; d < D; d++) {
    REAL value = query[d];
    for (int r = 0; r < R; r++) sum[r] += value * LOAD(from[r] + d * width);
  }
  for (int r = 0; r < R; r++) STORE(to + r * Kp) = sum[r];
}

/* Products of a row's queries (W, Dp) with the keys of their windows' rows from `first` to before
   `last`, added to `start` (N), zero if NULL: (W, N). `turned` are the rows of keys. */
static void products(const Slide *s, const REAL *queries, REAL *const *turned, I first, I last,
                     const REAL *start, REAL *to) {
  I D = s->D, Kp = s->Kp, width = s->width;
  for (I x = 0; x < s->W; x++, queries += s->Dp, to += s->N)
    for (I k = 0; k < Kp; k += LANES) {
      I r = first;
#define DOTS(R)                                                                                  \
  for (; r + R <= last; r += R)                                                                  \
    dots(queries, D, turned + r, x + k, width, start ? start + r * Kp + k : start, to + r * Kp + k, \
         Kp, R);
      DOTS(7)
      DOTS(3)
      DOTS(1)
    }
}

/* Attention weights (W, N) from scores, zero outside of the map and in padding. */
static void attend(const Slide *s, REAL *scores, const REAL *seen, I first, I last) {
  const Vec never = (Vec){0} - INFINITY;
  for (I x = 0; x < s->W; x++, scores += s->N, seen += s->Kp) {
    for (I r = first; r < last; r++)
      for (I k = 0; k < s->Kp; k += LANES) {
        VecBits in = (VecBits)LOAD(seen + k);
        VecBits score = (VecBits)LOAD(scores + r * s->Kp + k);
        STORE(scores + r * s->Kp + k) = (Vec)((score & in) | ((VecBits)never & ~in));
      }
    softmax(scores + first * s->Kp, (last - first) * s->Kp);
  }
}

/* A tile of R positions and J vectors of channels: out[r] = the sum over rows y and taps k of
   weights[y * Kp + r * N + k * next] * from[y][(r + k * step) * Dp], or out += if `more`. */
INLINE void band(const Slide *s, const REAL *weights, I next, REAL *const *from, I at, I step, I rows,
                 REAL *out, int more, const int R, const int J) {
  I Dp = s->Dp, N = s->N, taps = s->columns;
  Vec sum[ROWS][4];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) sum[r][j] = more ? LOAD(out + r * Dp + j * LANES) : (Vec){0};
  for (I y = 0; y < rows; y++) {
    const REAL *weight = weights + y * s->Kp, *source = from[y] + at;
    for (I k = 0; k < taps; k++, weight += next, source += step * Dp)
      for (int r = 0; r < R; r++) {
        REAL value = weight[r * N];
        for (int j = 0; j < J; j++) sum[r][j] += value * LOAD(source + r * Dp + j * LANES);
      }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) STORE(out + r * Dp + j * LANES) = sum[r][j];
}

#define BANDS(J)                                                                                 \
  static void bands_##J(const Slide *s, const REAL *weights, I next, REAL *const *from, I at,    \
                        I step, I rows, REAL *out, int more) {                                   \
    I x = 0, N = s->N, Dp = s->Dp;                                                               \
    for (; x + ROWS <= s->W; x += ROWS)                                                          \
      band(s, weights + x * N, next, from, at + x * Dp, step, rows, out + x * Dp, more, ROWS, J); \
    for (; x < s->W; x++)                                                                        \
      band(s, weights + x * N, next, from, at + x * Dp, step, rows, out + x * Dp, more, 1, J);   \
  }
BANDS(1)
BANDS(2)
BANDS(3)
BANDS(4)

/* The same for a row of the map and all channels: out (W, Dp). `at` is an element of the rows. */
static void spread(const Slide *s, const REAL *weights, I next, REAL *const *from, I at, I step,
                   I rows, REAL *out, int more) {
  for (I d = 0; d < s->Dp; d += 4 * LANES) {
    I left = least(4, (s->Dp - d) / LANES);
    if (left == 4) bands_4(s, weights, next, from, at + d, step, rows, out + d, more);
    if (left == 3) bands_3(s, weights, next, from, at + d, step, rows, out + d, more);
    if (left == 2) bands_2(s, weights, next, from, at + d, step, rows, out + d, more);
    if (left == 1) bands_1(s, weights, next, from, at + d, step, rows, out + d, more);
  }
}

/* out[x] = the weighted sum of the rows (Wp, Dp) in the window of x. */
static void mix(const Slide *s, const REAL *weights, REAL *const *rows, I first, I last, REAL *out) {
  spread(s, weights + first * s->Kp, 1, rows + first, 0, 1, last - first, out, 0);
}

/* The transpose, for one of the window's rows: out[x] += the sum over the queries whose window x is
   in. Weights are (Wp, N) and queries (Wp, Dp), `left` of them zero on both sides. */
static void unmix(const Slide *s, const REAL *weights, REAL *queries, I row, REAL *out) {
  I last = 2 * s->left;
  REAL *const from[] = {queries};
  spread(s, weights + last * s->N + row * s->Kp, 1 - s->N, from, last * s->Dp, -1, 1, out, 1);
}

/* The `rows` last rows of something of `size` elements a row; window row 0 of map row y is
   row y - up. */
INLINE REAL *slot(const Slide *s, REAL *ring, I row, I size) { return ring + row % s->rows * size; }
INLINE void around(const Slide *s, REAL *ring, I y, I first, I last, I size, REAL **to) {
  for (I r = first; r < last; r++) to[r] = slot(s, ring, y - s->up + r, size);
}

/* out (B, H, W, C) from qkv (B, H, W, 3C) and bias (heads, rows * columns). */
I sliding_attention(const Map *qkv, Map *out, const REAL *bias, I strips, I B, I H, I W, I heads,
                    I D, I rows, I columns, I threads) {
  Slide s = slide(B, H, W, heads, D, rows, columns);
  I C = s.C, failed = 0;
  REAL scale = (REAL)(1 / sqrt((double)D));
  const REAL *seen;
  REAL *table = table_of(&s, bias, &seen);
  if (!table) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    I turned = D * s.width, wide = s.Wp * s.Dp, plain = W * s.Dp;
    /* Zero once: the borders of the rows stay so. */
    REAL *keys = calloc(rows * (turned + wide) + 2 * plain + W * s.N, sizeof(REAL));
    REAL *values = keys + rows * turned, *query = values + rows * wide, *result = query + plain;
    REAL *weights = result + plain;
    REAL **near = allocate(2 * rows * sizeof(REAL *)), **mixed = near + rows;
    failed = !keys || !near;
#pragma omp for collapse(2) schedule(static)
    for (I i = 0; i < B * heads; i++)
      for (I strip = 0; strip < strips; strip++) {
        if (failed) continue;
        I b = i / heads, h = i % heads, top = start_of(&s, strip, strips), loaded = most(0, top - s.up);
        for (I y = top; y < start_of(&s, strip + 1, strips); y++) {
          const Map *row = qkv + (b * H + loaded) * W * 3 * C + h * D;
          for (; loaded < least(H, y + s.up + 1); loaded++, row += W * 3 * C) {
            turn(&s, row + C, 3 * C, slot(&s, keys, loaded, turned));
            gather(&s, row + 2 * C, 3 * C, slot(&s, values, loaded, wide) + s.left * s.Dp, 1);
          }
          I first = most(0, s.up - y), last = least(rows, H - y + s.up), place = (b * H + y) * W;
          around(&s, keys, y, first, last, turned, near);
          around(&s, values, y, first, last, wide, mixed);
          gather(&s, qkv + place * 3 * C + h * D, 3 * C, query, scale);
          products(&s, query, near, first, last, table + h * s.N, weights);
          attend(&s, weights, seen, first, last);
          mix(&s, weights, mixed, first, last, result);
          scatter(&s, result, out + place * C + h * D, C, 1);
        }
      }
    free(keys);
    free(near);
  }
  free(table);
  return failed;
}

/* The gradients of a row's scores, in place of those of its weights, and their sum over the queries
   in `total` (N). */
static void scores_gradient(const Slide *s, const REAL *weights, REAL *scores, const REAL *seen,
                            I first, I last, REAL *total) {
  for (I x = 0; x < s->W; x++, scores += s->N, weights += s->N, seen += s->Kp) {
    REAL mean = 0;
    Vec sum = {0};
    for (I r = first; r < last; r++)
      for (I k = 0; k < s->Kp; k += LANES) {
        I n = r * s->Kp + k;
        /* What is not seen may be infinite, and its weight is zero. */
        Vec score = (Vec)((VecBits)LOAD(scores + n) & (VecBits)LOAD(seen + k));
        STORE(scores + n) = score;
        sum += score * LOAD(weights + n);
      }
    for (I i = 0; i < LANES; i++) mean += sum[i];
    for (I n = first * s->Kp; n < last * s->Kp; n += LANES) {
      Vec value = (LOAD(scores + n) - mean) * LOAD(weights + n);
      STORE(scores + n) = value;
      STORE(total + n) += value;
    }
  }
}

/* dqkv, whose keys and values are zero on entry, and partial sums of dbias
   (B, strips, heads, rows * columns), from the gradient of out. A strip adds to up to rows / 2 rows of
   the strips beside it, so even and odd strips run one after the other; each has at least rows - 1. */
I sliding_attention_backward(const Map *grad, const Map *qkv, Map *dqkv, const REAL *bias,
                             REAL *dbias, I strips, I B, I H, I W, I heads, I D, I rows, I columns,
                             I threads) {
  Slide s = slide(B, H, W, heads, D, rows, columns);
  I C = s.C, failed = 0;
  REAL scale = (REAL)(1 / sqrt((double)D));
  const REAL *seen;
  REAL *table = table_of(&s, bias, &seen);
  if (!table) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    I turned = D * s.width, wide = s.Wp * s.Dp, plain = W * s.Dp, square = s.Wp * s.N;
    I border = s.left * s.Dp, before = s.left * s.N;
    REAL *keys = calloc(rows * (2 * turned + wide + 2 * plain) + 2 * wide + plain + 2 * square + s.N,
                        sizeof(REAL));
    REAL *values = keys + rows * turned, *plain_keys = values + rows * turned;
    REAL *dkeys = plain_keys + rows * wide, *dvalues = dkeys + rows * plain;
    REAL *query = dvalues + rows * plain, *given = query + wide, *result = given + wide;
    REAL *weights = result + plain, *scores = weights + square, *total = scores + square;
    REAL **near = allocate(3 * rows * sizeof(REAL *)), **mixed = near + rows, **from = mixed + rows;
    failed = !keys || !near;
    for (I parity = 0; parity < 2; parity++)
#pragma omp for collapse(2) schedule(static, 1)
      for (I i = 0; i < B * heads; i++)
        for (I strip = parity; strip < strips; strip += 2) {
          if (failed) continue;
          I b = i / heads, h = i % heads, top = start_of(&s, strip, strips);
          I bottom = start_of(&s, strip + 1, strips), loaded = most(0, top - s.up), done = loaded;
          memset(total, 0, s.N * sizeof(REAL));
          for (I y = top; y < bottom; y++) {
            const Map *row = qkv + (b * H + loaded) * W * 3 * C + h * D;
            for (; loaded < least(H, y + s.up + 1); loaded++, row += W * 3 * C) {
              turn(&s, row + C, 3 * C, slot(&s, keys, loaded, turned));
              turn(&s, row + 2 * C, 3 * C, slot(&s, values, loaded, turned));
              gather(&s, row + C, 3 * C, slot(&s, plain_keys, loaded, wide) + border, 1);
              memset(slot(&s, dkeys, loaded, plain), 0, plain * sizeof(REAL));
              memset(slot(&s, dvalues, loaded, plain), 0, plain * sizeof(REAL));
            }
            I first = most(0, s.up - y), last = least(rows, H - y + s.up), place = (b * H + y) * W;
            around(&s, keys, y, first, last, turned, near);
            around(&s, values, y, first, last, turned, from);
            around(&s, plain_keys, y, first, last, wide, mixed);
            gather(&s, qkv + place * 3 * C + h * D, 3 * C, query + border, scale);
            gather(&s, grad + place * C + h * D, C, given + border, 1);
            products(&s, query + border, near, first, last, table + h * s.N, weights + before);
            attend(&s, weights + before, seen, first, last);
            products(&s, given + border, from, first, last, 0, scores + before);
            scores_gradient(&s, weights + before, scores + before, seen, first, last, total);
            mix(&s, scores + before, mixed, first, last, result);
            scatter(&s, result, dqkv + place * 3 * C + h * D, 3 * C, scale);
            for (I r = first; r < last; r++) {
              unmix(&s, scores, query, r, slot(&s, dkeys, y - s.up + r, plain));
              unmix(&s, weights, given, r, slot(&s, dvalues, y - s.up + r, plain));
            }
            /* Rows above the next position's window are complete. */
            for (I end = y + 1 < bottom ? y + 1 - s.up : loaded; done < end; done++) {
              Map *to = dqkv + (b * H + done) * W * 3 * C + h * D;
              add(&s, slot(&s, dkeys, done, plain), to + C, 3 * C);
              add(&s, slot(&s, dvalues, done, plain), to + 2 * C, 3 * C);
            }
          }
          for (I r = 0; r < rows; r++)
            memcpy(dbias + (((b * strips + strip) * heads + h) * rows + r) * columns,
                   total + r * s.Kp, columns * sizeof(REAL));
        }
    free(keys);
    free(near);
  }
  free(table);
  return failed;
}
