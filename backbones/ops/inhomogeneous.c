/* Depth-wise convolution with a kernel at every position, compiled by backbones.ops.native.

   Maps are (B, H, W, G, S), C = G * S. Inside, groups are innermost, (S, G), as in kernels (K*K, G),
   so that both are read as vectors, and x and dx are zero-padded to (B, H + K - 1, W + K - 1, S, G),
   of width Wp. The order of sums does not depend on the number of threads: results are bitwise
   reproducible. Functions return 1 if memory runs out. */

#include "factors.h"

#include <string.h>

/* Transpose n rows of m elements; compilers have vectors for an m that they know. */
INLINE void turn_in(const Map *from, REAL *to, I n, I m) {
  if (m == 3)
    for (I j = 0; j < n; j++)
      for (I i = 0; i < 3; i++) to[i * n + j] = READ(One, from + j * 3 + i);
  else
    for (I i = 0; i < m; i++)
      for (I j = 0; j < n; j++) to[i * n + j] = READ(One, from + j * m + i);
}
INLINE void turn_out(const REAL *from, Map *to, I n, I m) {
  if (m == 3)
    for (I i = 0; i < n; i++)
      for (I j = 0; j < 3; j++) WRITE(One, to + i * 3 + j, from[j * n + i]);
  else
    for (I i = 0; i < n; i++)
      for (I j = 0; j < m; j++) WRITE(One, to + i * m + j, from[j * n + i]);
}

typedef struct {
  I B, H, W, S, G, K, Hp, Wp, before;
} Grid;
static Grid grid(I B, I H, I W, I S, I G, I K) {
  return (Grid){B, H, W, S, G, K, H + K - 1, W + K - 1, (K - 1) / 2};
}
/* The elements of a padded map before those of the window of position p. */
INLINE I corner(const Grid *m, I p) {
  I row = p / m->W;
  return ((row / m->H * m->Hp + row % m->H) * m->Wp + p % m->W) * m->S * m->G;
}

/* Positions of an image before a strip of its rows; the last strip has what is left over. */
INLINE I start_of(const Grid *m, I strip, I strips) {
  return (strip < strips ? m->H / strips * strip : m->H) * m->W;
}

/* Pad a map, zero a padded one, take a map's part of it; all threads of a region call them. */
static void pad(const Grid *m, const Map *x, REAL *to) {
  I C = m->S * m->G;
#pragma omp for schedule(static)
  for (I row = 0; row < m->B * m->Hp; row++) {
    I y = row % m->Hp - m->before;
    REAL *at = to + row * m->Wp * C;
    memset(at, 0, m->Wp * C * sizeof(REAL));
    const Map *from = x + (row / m->Hp * m->H + y) * m->W * C;
    for (I p = 0; y >= 0 && y < m->H && p < m->W; p++)
      turn_in(from + p * C, at + (m->before + p) * C, m->G, m->S);
  }
}
static void clear(const Grid *m, REAL *to) {
#pragma omp for schedule(static)
  for (I row = 0; row < m->B * m->Hp; row++)
    memset(to + row * m->Wp * m->S * m->G, 0, m->Wp * m->S * m->G * sizeof(REAL));
}
static void crop(const Grid *m, const REAL *from, Map *dx) {
  I C = m->S * m->G;
#pragma omp for schedule(static)
  for (I row = 0; row < m->B * m->H; row++)
    for (I p = row * m->W; p < (row + 1) * m->W; p++)
      turn_out(from + corner(m, p) + (m->before * m->Wp + m->before) * C, dx + p * C, m->G, m->S);
}

/* The output of one position for the groups at g and N of the S channels from j on. */
#define AGGREGATE(T)                                                                              \
  INLINE void aggregate_##T(const REAL *x, const REAL *kernel, REAL *out, I Wp, I S, I G,         \
                            const I K, I j, I g, const int N) {                                   \
    T sum[4];                                                                                     \
    for (int i = 0; i < N; i++) sum[i] = (T){0};                                                  \
    for (I u = 0; u < K; u++)                                                                     \
      for (I v = 0; v < K; v++) {                                                                 \
        T weight = AT(T, kernel + (u * K + v) * G + g);                                           \
        const REAL *from = x + (u * Wp + v) * S * G + j * G + g;                                  \
        for (int i = 0; i < N; i++) sum[i] += AT(T, from + i * G) * weight;                       \
      }                                                                                           \
    for (int i = 0; i < N; i++) SET(T, out + (j + i) * G + g) = sum[i];                           \
  }                                                                                               \
  INLINE void aggregate_all_##T(const REAL *x, const REAL *kernel, REAL *out, I Wp, I S, I G,     \
                                const I K, I g) {                                                 \
    I j = 0;                                                                                      \
    for (; j + 4 <= S; j += 4) aggregate_##T(x, kernel, out, Wp, S, G, K, j, g, 4);               \
    if (S - j == 3) aggregate_##T(x, kernel, out, Wp, S, G, K, j, g, 3);                          \
    if (S - j == 2) aggregate_##T(x, kernel, out, Wp, S, G, K, j, g, 2);                          \
    if (S - j == 1) aggregate_##T(x, kernel, out, Wp, S, G, K, j, g, 1);                          \
  }
AGGREGATE(Vec)
AGGREGATE(One)
AGGREGATE(Wide)

/* Outputs (n, S, G) of n positions from p on, of kernels (n, width). Positions are innermost: those
   beside each other read almost the same part of x, which stays in a core's cache. */
INLINE void aggregate_at(const Grid *m, const REAL *x, I p, I n, const REAL *kernels, I width,
                         REAL *out) {
  I S = m->S, G = m->G, K = m->K, Wp = m->Wp, g = 0;
#define AGGREGATE_FROM(T, lanes, size)                                                            \
  for (; g + lanes <= G; g += lanes)                                                              \
    for (I i = 0; i < n; i++)                                                                     \
      aggregate_all_##T(x + corner(m, p + i), kernels + i * width, out + i * S * G, Wp, S, G,     \
                        size, g);
  if (K == 7) {
    AGGREGATE_FROM(Wide, SPAN, 7)
    AGGREGATE_FROM(Vec, LANES, 7)
  }
  AGGREGATE_FROM(Vec, LANES, K)
  AGGREGATE_FROM(One, 1, K)
}

/* Positions whose kernels are predicted at a time, so that they stay in a core's cache. */
#define TOGETHER ((I)24)
/* Parts of n positions that are nearly equal, and even: a product's last row of an odd number may
   be rounded otherwise. */
INLINE I step_of(I n) {
  I parts = most(1, (n + TOGETHER - 1) / TOGETHER);
  return most(2, (n + 2 * parts - 1) / (2 * parts) * 2);
}

/* n rows of `width` numbers as factors, neighbours in a row joined; `to` is used if need be. */
INLINE const Factor *along(const REAL *rows, I n, I width, Factor *to) {
#if PAIR == 1
  return rows;
#else
  write_row(rows, (Map *)to, n * width, 1);
  return to;
#endif
}
/* The same, neighbours in a column joined. */
INLINE const Factor *across(const REAL *rows, I n, I width, Factor *to) {
#if PAIR == 1
  return rows;
#else
  for (I i = 0; i < n; i += 2) {
    const REAL *at = rows + i * width;
    Factor *joined = to + i / 2 * width;
    I j = 0, both = i + 1 < n;
    for (; j + SPAN <= width; j += SPAN)
      SET(WideWords, joined + j) =
          join_Wide(AT(Wide, at + j), both ? AT(Wide, at + width + j) : (Wide){0});
    if (j < width) SET(Words, joined + j) = join(LOAD(at + j), both ? LOAD(at + width + j) : (Vec){0});
  }
  return to;
#endif
}

/* Add a row of whole vectors to another. */
INLINE void add_row(const REAL *from, REAL *to, I width) {
  I i = 0;
  for (; i + SPAN <= width; i += SPAN) SET(Wide, to + i) += AT(Wide, from + i);
  if (i < width) STORE(to + i) += LOAD(from + i);
}

/* What predicts kernels, `width` numbers by tap, from D channels, padded Dp: the weight (G*K*K, D)
   as matrix (D, width) and its transpose back (width, Dp), neighbours in a column joined, and the
   bias as offset (width). */
typedef struct {
  I D, Dp, width;
  Factor *matrix, *back;
  REAL *offset;
} Predictor;

static int predictor(Predictor *w, const REAL *weight, const REAL *bias, I G, I taps, I D, int backward,
                     I threads) {
  I many = taps * G, width = padded(many), Dp = padded(D);
  I size = halved(D) * width, back = backward ? halved(width) * Dp : 0;
  I bytes = (size + back + width) * sizeof(Factor);
  *w = (Predictor){D, Dp, width, allocate(bytes)};
  w->back = w->matrix + size;
  w->offset = (REAL *)(w->back + back);
  if (!w->matrix) return 1;
  memset(w->matrix, 0, bytes);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (I t = 0; t < taps; t++)
      for (I d = 0; d < D; d += PAIR)
        for (I g = 0; g < G; g++) {
          const REAL *at = weight + (g * taps + t) * D + d;
          Vec one = {at[0]}, next = {PAIR > 1 && d + 1 < D ? at[1] : 0};
          w->matrix[d / PAIR * width + t * G + g] = join(one, next)[0];
        }
#pragma omp for schedule(static)
    for (I m = 0; m < many; m += PAIR) {
      I after = PAIR > 1 && m + 1 < many ? m + 1 : 0;
      const REAL *row = weight + (m % G * taps + m / G) * D;
      const REAL *next = weight + (after % G * taps + after / G) * D;
      for (I d = 0; d < D && backward; d++)
        w->back[m / PAIR * Dp + d] = join((Vec){row[d]}, (Vec){after ? next[d] : 0})[0];
    }
  }
  for (I m = 0; m < many; m++) w->offset[m] = bias[m % G * taps + m / G];
  return 0;
}

/* Kernels (n, width) of n positions from hidden (n, D), which becomes rows (n, Dp); `factors` has
   room for as many. */
INLINE void predict(const Predictor *w, const Map *hidden, I n, REAL *rows, Factor *factors,
                    REAL *kernels) {
  for (I i = 0; i < n; i++) {
    read_row(hidden + i * w->D, rows + i * w->Dp, w->D, 1);
    for (I d = w->D; d < w->Dp; d++) rows[i * w->Dp + d] = 0;
  }
  multiply_from_factors(along(rows, n, w->Dp, factors), w->Dp / PAIR, 1, w->matrix, w->width, kernels,
                        w->width, w->width, n, halved(w->D), 0, w->offset);
}

/* Convolve x (B, H, W, G, S) with the kernels hidden @ weight.T + bias: hidden is (B, H, W, D),
   weight (G*K*K, D). */
I predict_and_aggregate(const Map *x, const Map *hidden, Map *out, const REAL *weight,
                        const REAL *bias, I B, I H, I W, I S, I G, I K, I D, I threads) {
  Grid m = grid(B, H, W, S, G, K);
  I C = S * G, all = B * H * W, failed = 0;
  I step = step_of((all + threads - 1) / threads);
  REAL *x_padded = allocate(B * m.Hp * m.Wp * C * sizeof(REAL));
  Predictor w;
  if (predictor(&w, weight, bias, G, K * K, D, 0, threads) || !x_padded) {
    free(w.matrix);
    free(x_padded);
    return 1;
  }
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    REAL *kernels = allocate(TOGETHER * (w.width + 2 * w.Dp + C) * sizeof(REAL));
    REAL *rows = kernels + TOGETHER * w.width, *result = rows + TOGETHER * w.Dp;
    Factor *factors = (Factor *)(result + TOGETHER * C);
    failed = !kernels;
    pad(&m, x, x_padded);
#pragma omp for schedule(static)
    for (I p = 0; p < all; p += step) {
      I n = least(step, all - p);
      if (failed) continue;
      predict(&w, hidden + p * D, n, rows, factors, kernels);
      aggregate_at(&m, x_padded, p, n, kernels, w.width, result);
      for (I i = 0; i < n; i++) turn_out(result + i * C, out + (p + i) * C, G, S);
    }
    free(kernels);
  }
  free(w.matrix);
  free(x_padded);
  return failed;
}

/* Backward of one position: add its part of dx, and overwrite its kernel by the kernel's gradient.
   `held` is S if S is a constant, so that gradients stay in registers, else 0. */
#define SPREAD(T)                                                                                 \
  INLINE void spread_##T(const REAL *x, const REAL *grad, REAL *dx, REAL *kernel, I Wp, I S, I G, \
                         const I K, I g, const int held) {                                        \
    T given[4];                                                                                   \
    for (int j = 0; j < held; j++) given[j] = AT(T, grad + j * G + g);                            \
    for (I u = 0; u < K; u++)                                                                     \
      for (I v = 0; v < K; v++) {                                                                 \
        I place = (u * Wp + v) * S * G + g;                                                       \
        T weight = AT(T, kernel + (u * K + v) * G + g), sum = (T){0};                             \
        for (int j = 0; j < held; j++, place += G) {                                              \
          sum += AT(T, x + place) * given[j];                                                     \
          SET(T, dx + place) += weight * given[j];                                                \
        }                                                                                         \
        for (I j = held; j < S; j++, place += G) {                                                \
          T value = AT(T, grad + j * G + g);                                                      \
          sum += AT(T, x + place) * value;                                                        \
          SET(T, dx + place) += weight * value;                                                   \
        }                                                                                         \
        SET(T, kernel + (u * K + v) * G + g) = sum;                                               \
      }                                                                                           \
  }
SPREAD(Vec)
SPREAD(One)
SPREAD(Wide)

INLINE void spread_at(const Grid *m, const REAL *x, I p, I n, const REAL *grad, REAL *dx, REAL *kernels,
                      I width) {
  I S = m->S, G = m->G, K = m->K, Wp = m->Wp, g = 0;
#define SPREAD_FROM(T, lanes, shared, size, held)                                                 \
  for (; g + lanes <= G; g += lanes)                                                              \
    for (I i = 0; i < n; i++) {                                                                   \
      I at = corner(m, p + i);                                                                    \
      spread_##T(x + at, grad + i * S * G, dx + at, kernels + i * width, Wp, shared, G, size, g,  \
                 held);                                                                           \
    }
  if (K == 7 && S == 3) {
    SPREAD_FROM(Wide, SPAN, 3, 7, 3)
    SPREAD_FROM(Vec, LANES, 3, 7, 3)
  } else if (K == 7) {
    SPREAD_FROM(Wide, SPAN, S, 7, 0)
    SPREAD_FROM(Vec, LANES, S, 7, 0)
  }
  SPREAD_FROM(Vec, LANES, S, K, 0)
  SPREAD_FROM(One, 1, S, K, 0)
}

/* The gradients. dweight (groups, strips, D, width) and dbias (groups, strips, width), by tap, are
   partial sums over groups of images and strips of rows. A strip also writes K - 1 rows of dx that
   belong to the next strip, so even and odd strips run one after the other; each has at least K - 1
   rows. */
I predict_and_aggregate_backward(const Map *grad, const Map *x, const Map *hidden, Map *dx,
                                 Map *dhidden, const REAL *weight, const REAL *bias, REAL *dweight,
                                 REAL *dbias, I groups, I strips, I B, I H, I W, I S, I G, I K, I D,
                                 I threads) {
  Grid m = grid(B, H, W, S, G, K);
  I C = S * G, size = B * m.Hp * m.Wp * C, failed = 0;
  Predictor w;
  REAL *x_padded = allocate(2 * size * sizeof(REAL)), *dx_padded = x_padded + size;
  if (predictor(&w, weight, bias, G, K * K, D, 1, threads) || !x_padded) {
    free(w.matrix);
    free(x_padded);
    return 1;
  }
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    I Dp = w.Dp, width = w.width, narrow = TOGETHER * Dp, wide = TOGETHER * width;
    REAL *kernels = allocate((2 * (wide + narrow) + TOGETHER * C) * sizeof(REAL)), *rows = kernels + wide;
    REAL *given = rows + narrow;
    Factor *factors = (Factor *)(given + TOGETHER * C), *others = factors + wide;
    failed = !kernels;
    pad(&m, x, x_padded);
    clear(&m, dx_padded);
    for (I parity = 0; parity < 2; parity++)
#pragma omp for collapse(2) schedule(static, 1)
      for (I group = 0; group < groups; group++)
        for (I strip = parity; strip < strips; strip += 2) {
          I part = group * strips + strip;
          I first = start_of(&m, strip, strips), last = start_of(&m, strip + 1, strips);
          I step = step_of(last - first);
          REAL *dw = dweight + part * D * width, *db = dbias + part * width;
          memset(dw, 0, D * width * sizeof(REAL));
          memset(db, 0, width * sizeof(REAL));
          for (I b = B * group / groups; b < B * (group + 1) / groups; b++)
            for (I at = first; at < last && !failed; at += step) {
              I n = least(step, last - at), p = b * H * W + at;
              predict(&w, hidden + p * D, n, rows, factors, kernels);
              for (I i = 0; i < n; i++) turn_in(grad + (p + i) * C, given + i * C, G, S);
              spread_at(&m, x_padded, p, n, given, dx_padded, kernels, width);
              for (I i = 0; i < n; i++) add_row(kernels + i * width, db, width);
              const Factor *from = across(rows, n, Dp, others);
              multiply_factors(from, 1, Dp, across(kernels, n, width, factors), width, dw, width, width,
                               D, halved(n), 1);
              multiply_factors(along(kernels, n, width, factors), width / PAIR, 1, w.back, Dp, rows, Dp,
                               Dp, n, halved(width), 0);
              for (I i = 0; i < n; i++) write_row(rows + i * Dp, dhidden + (p + i) * D, D, 1);
            }
        }
    crop(&m, dx_padded, dx);
    free(kernels);
  }
  free(w.matrix);
  free(x_padded);
  return failed;
}

/* Convolve x with given kernels (B, H, W, G, K*K). */
I aggregate(const Map *x, const Map *given, Map *out, I B, I H, I W, I S, I G, I K, I threads) {
  Grid m = grid(B, H, W, S, G, K);
  I C = S * G, many = K * K * G, failed = 0;
  REAL *x_padded = allocate(B * m.Hp * m.Wp * C * sizeof(REAL));
  if (!x_padded) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    REAL *kernel = allocate((many + C) * sizeof(REAL)), *result = kernel + many;
    failed = !kernel;
    pad(&m, x, x_padded);
#pragma omp for schedule(static)
    for (I p = 0; p < B * H * W; p++) {
      if (failed) continue;
      turn_in(given + p * many, kernel, G, K * K);
      aggregate_at(&m, x_padded, p, 1, kernel, many, result);
      turn_out(result, out + p * C, G, S);
    }
    free(kernel);
  }
  free(x_padded);
  return failed;
}

/* dx and dgiven; strips as in predict_and_aggregate_backward. */
I aggregate_backward(const Map *grad, const Map *x, const Map *given, Map *dx, Map *dgiven, I strips,
                     I B, I H, I W, I S, I G, I K, I threads) {
  Grid m = grid(B, H, W, S, G, K);
  I C = S * G, many = K * K * G, size = B * m.Hp * m.Wp * C, failed = 0;
  REAL *x_padded = allocate(2 * size * sizeof(REAL)), *dx_padded = x_padded + size;
  if (!x_padded) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    REAL *kernel = allocate((many + C) * sizeof(REAL)), *from = kernel + many;
    failed = !kernel;
    pad(&m, x, x_padded);
    clear(&m, dx_padded);
    for (I parity = 0; parity < 2; parity++)
#pragma omp for collapse(2) schedule(static, 1)
      for (I b = 0; b < B; b++)
        for (I strip = parity; strip < strips; strip += 2)
          for (I at = start_of(&m, strip, strips); at < start_of(&m, strip + 1, strips); at++) {
            I p = b * H * W + at;
            if (failed) continue;
            turn_in(given + p * many, kernel, G, K * K);
            turn_in(grad + p * C, from, G, S);
            spread_at(&m, x_padded, p, 1, from, dx_padded, kernel, many);
            turn_out(kernel, dgiven + p * many, G, K * K);
          }
    crop(&m, dx_padded, dx);
    free(kernel);
  }
  free(x_padded);
  return failed;
}
