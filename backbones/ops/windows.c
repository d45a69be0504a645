/* Attention and static mixing inside shifted windows, compiled by backbones.ops.native.

   Maps are contiguous (B, H, W, channels); roll and partition are index arithmetic. Each window is
   gathered into small matrices, whose rows are padded to whole vectors, and multiplied there. Sums
   over windows use fixed chunks: results are bitwise reproducible on any number of threads.

   Shared arguments: heads of D channels; windows of rows x columns positions; a cyclic shift by
   `down` rows and `right` columns. Functions return 1 if memory runs out. */

#include "matrix.h"

#include <math.h>
#include <string.h>

/* The windows of a map. N: positions of a window; Np, Dp: N and D padded to whole vectors; across:
   windows in a row; windows: windows of an image. */
typedef struct {
  I B, H, W, heads, D, rows, columns, down, right, N, Np, Dp, across, windows;
} Cut;

static Cut cut(I B, I H, I W, I heads, I D, I rows, I columns, I down, I right) {
  I N = rows * columns, across = W / columns;
  return (Cut){B, H, W, heads, D, rows, columns, down, right, N, padded(N), padded(D), across,
               H / rows * across};
}

/* Bits: 1 if a window mixes the first and last rows of the map after the shift, 2 the columns. */
INLINE I seam_of(const Cut *c, I window) {
  I last_row = window / c->across == c->H / c->rows - 1, last = window % c->across == c->across - 1;
  return (last_row && c->down ? 1 : 0) + (last && c->right ? 2 : 0);
}

/* Offsets of a window's positions in its image, for a map with `channels` channels. */
INLINE void places(const Cut *c, I window, I channels, I *to) {
  I top = window / c->across * c->rows + c->down, left = window % c->across * c->columns + c->right;
  for (I y = top; y < top + c->rows; y++)
    for (I x = left; x < left + c->columns; x++)
      *to++ = ((y < c->H ? y : y - c->H) * c->W + (x < c->W ? x : x - c->W)) * channels;
}

/* For each position of a window on the seam, bits: 1 below the seam, 2 right of it. */
static unsigned char *sides_of(const Cut *c) {
  unsigned char *sides = allocate(c->N);
  for (I n = 0; sides && n < c->N; n++)
    sides[n] = (n / c->columns >= c->rows - c->down) | (n % c->columns >= c->columns - c->right) << 1;
  return sides;
}

/* Copy one head of a window to (N, Dp), and back; `at` has the offsets of the positions. */
INLINE void gather(const Cut *c, const Map *map, const I *at, REAL *to, REAL scale) {
  for (I n = 0; n < c->N; n++, to += c->Dp) {
    read_row(map + at[n], to, c->D, scale);
    for (I d = c->D; d < c->Dp; d++) to[d] = 0;
  }
}
INLINE void scatter(const Cut *c, const REAL *from, Map *map, const I *at, REAL scale) {
  for (I n = 0; n < c->N; n++) write_row(from + n * c->Dp, map + at[n], c->D, scale);
}

/* (N, Dp) to (D, Np), zero-padded. */
INLINE void transpose(const Cut *c, const REAL *from, REAL *to) {
  for (I d = 0; d < c->D; d++) {
    for (I n = 0; n < c->N; n++) to[d * c->Np + n] = from[n * c->Dp + d];
    for (I n = c->N; n < c->Np; n++) to[d * c->Np + n] = 0;
  }
}

/* (4, heads, N, Np): the bias for each value of seam_of, -inf across the seam and in padding. */
static REAL *masked_bias(const Cut *c, const REAL *bias) {
  REAL *all = allocate(4 * c->heads * c->N * c->Np * sizeof(REAL)), *to = all;
  unsigned char *sides = sides_of(c);
  for (I seam = 0; all && sides && seam < 4; seam++)
    for (I h = 0; h < c->heads; h++)
      for (I n = 0; n < c->N; n++, to += c->Np)
        for (I m = 0; m < c->Np; m++) {
          int seen = m < c->N && !((sides[n] ^ sides[m]) & seam);
          to[m] = seen ? bias[(h * c->N + n) * c->N + m] : -INFINITY;
        }
  if (!sides) {
    free(all);
    all = NULL;
  }
  free(sides);
  return all;
}

/* Attention weights (N, Np) of a window and head; also query and key (N, Dp), and keys (D, Np). */
static void attend(const Cut *c, const Map *image, const REAL *bias, I window, I h, const I *at,
                   REAL *query, REAL *key, REAL *keys, REAL *weights) {
  I C = c->heads * c->D, square = c->N * c->Np;
  gather(c, image + h * c->D, at, query, (REAL)(1 / sqrt((double)c->D)));
  gather(c, image + C + h * c->D, at, key, 1);
  transpose(c, key, keys);
  memcpy(weights, bias + (seam_of(c, window) * c->heads + h) * square, square * sizeof(REAL));
  multiply(query, c->Dp, 1, keys, c->Np, weights, c->Np, c->Np, c->N, c->D, 1);
  for (I n = 0; n < c->N; n++) softmax(weights + n * c->Np, c->Np);
}

/* out (B, H, W, C) from qkv (B, H, W, 3C) and bias (heads, N, N). */
I window_attention(const Map *qkv, Map *out, const REAL *bias, I B, I H, I W, I heads, I D, I rows,
                   I columns, I down, I right, I threads) {
  Cut c = cut(B, H, W, heads, D, rows, columns, down, right);
  I C = heads * D, failed = 0;
  REAL *masked = masked_bias(&c, bias);
  if (!masked) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    I part = c.N * c.Dp;
    REAL *query = allocate((3 * part + D * c.Np + c.N * c.Np) * sizeof(REAL));
    REAL *key = query + part, *value = key + part, *keys = value + part, *weights = keys + D * c.Np;
    I *at = allocate(2 * c.N * sizeof(I)), *to = at + c.N;
    failed = !query || !at;
#pragma omp for collapse(3) schedule(static)
    for (I b = 0; b < B; b++)
      for (I window = 0; window < c.windows; window++)
        for (I h = 0; h < heads; h++) {
          if (failed) continue;
          const Map *image = qkv + b * H * W * 3 * C;
          places(&c, window, 3 * C, at);
          places(&c, window, C, to);
          attend(&c, image, masked, window, h, at, query, key, keys, weights);
          gather(&c, image + 2 * C + h * D, at, value, 1);
          multiply(weights, c.Np, 1, value, c.Dp, query, c.Dp, c.Dp, c.N, c.N, 0);
          scatter(&c, query, out + b * H * W * C + h * D, to, 1);
        }
    free(query);
    free(at);
  }
  free(masked);
  return failed;
}

/* dqkv, and partial sums of dbias (chunks, heads, N, N), from the gradient of out. */
I window_attention_backward(const Map *grad, const Map *qkv, Map *dqkv, const REAL *bias,
                            REAL *dbias, I chunks, I B, I H, I W, I heads, I D, I rows, I columns,
                            I down, I right, I threads) {
  Cut c = cut(B, H, W, heads, D, rows, columns, down, right);
  I C = heads * D, all = B * c.windows, failed = 0;
  REAL *masked = masked_bias(&c, bias);
  if (!masked) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    I part = c.N * c.Dp, square = c.N * c.Np;
    REAL *query = allocate((5 * part + D * c.Np + 3 * square) * sizeof(REAL));
    REAL *key = query + part, *value = key + part, *from = value + part, *to = from + part;
    REAL *turned = to + part, *weights = turned + D * c.Np, *scores = weights + square;
    REAL *total = scores + square, scale = (REAL)(1 / sqrt((double)D));
    I *at = allocate(2 * c.N * sizeof(I)), *given = at + c.N;
    failed = !query || !at;
#pragma omp for collapse(2) schedule(static)
    for (I chunk = 0; chunk < chunks; chunk++)
      for (I h = 0; h < heads; h++) {
        if (failed) continue;
        memset(total, 0, square * sizeof(REAL));
        for (I i = all * chunk / chunks; i < all * (chunk + 1) / chunks; i++) {
          I b = i / c.windows, window = i % c.windows;
          const Map *image = qkv + b * H * W * 3 * C;
          Map *dimage = dqkv + b * H * W * 3 * C + h * D;
          places(&c, window, 3 * C, at);
          places(&c, window, C, given);
          attend(&c, image, masked, window, h, at, query, key, turned, weights);
          gather(&c, image + 2 * C + h * D, at, value, 1);
          gather(&c, grad + b * H * W * C + h * D, given, from, 1);
          multiply(weights, 1, c.Np, from, c.Dp, to, c.Dp, c.Dp, c.N, c.N, 0);
          scatter(&c, to, dimage + 2 * C, at, 1);
          transpose(&c, value, turned);
          multiply(from, c.Dp, 1, turned, c.Np, scores, c.Np, c.Np, c.N, D, 0);
          for (I n = 0; n < c.N; n++) {
            REAL *score = scores + n * c.Np, *weight = weights + n * c.Np, mean = 0;
            Vec sum = {0};
            for (I m = 0; m < c.Np; m += LANES) sum += LOAD(score + m) * LOAD(weight + m);
            for (I m = 0; m < LANES; m++) mean += sum[m];
            for (I m = 0; m < c.Np; m += LANES) {
              Vec value = (LOAD(score + m) - mean) * LOAD(weight + m);
              STORE(score + m) = value;
              STORE(total + n * c.Np + m) += value;
            }
          }
          multiply(scores, c.Np, 1, key, c.Dp, to, c.Dp, c.Dp, c.N, c.N, 0);
          scatter(&c, to, dimage, at, scale);
          multiply(scores, 1, c.Np, query, c.Dp, to, c.Dp, c.Dp, c.N, c.N, 0);
          scatter(&c, to, dimage + C, at, 1);
        }
        for (I n = 0; n < c.N; n++)
          memcpy(dbias + ((chunk * heads + h) * c.N + n) * c.N, total + n * c.Np,
                 c.N * sizeof(REAL));
      }
    free(query);
    free(at);
  }
  free(masked);
  return failed;
}

/* The weights (N, Np) of a window, zero across the seam. */
INLINE void mix(const Cut *c, const REAL *weight, const unsigned char *sides, I seam, REAL *to) {
  for (I n = 0; n < c->N; n++, weight += c->N, to += c->Np) {
    memcpy(to, weight, c->N * sizeof(REAL));
    for (I m = 0; seam && m < c->N; m++) to[m] = (sides[n] ^ sides[m]) & seam ? 0 : to[m];
    for (I m = c->N; m < c->Np; m++) to[m] = 0;
  }
}

/* out = weight @ value in each window; weight is (windows or 1, heads, N, N), `step` the elements
   from one window's weights to the next window's, 0 if shared. */
I local_mlp(const Map *value, Map *out, const REAL *weight, I step, I B, I H, I W, I heads, I D,
            I rows, I columns, I down, I right, I threads) {
  Cut c = cut(B, H, W, heads, D, rows, columns, down, right);
  I C = heads * D, failed = 0;
  unsigned char *sides = sides_of(&c);
  if (!sides) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    I part = c.N * c.Dp;
    REAL *from = allocate((2 * part + c.N * c.Np) * sizeof(REAL));
    REAL *to = from + part, *mixing = to + part;
    I *at = allocate(c.N * sizeof(I));
    failed = !from || !at;
#pragma omp for collapse(2) schedule(static)
    for (I window = 0; window < c.windows; window++)
      for (I h = 0; h < heads; h++) {
        if (failed) continue;
        places(&c, window, C, at);
        mix(&c, weight + window * step + h * c.N * c.N, sides, seam_of(&c, window), mixing);
        for (I b = 0; b < B; b++) {
          I place = b * H * W * C + h * D;
          gather(&c, value + place, at, from, 1);
          multiply(mixing, c.Np, 1, from, c.Dp, to, c.Dp, c.Dp, c.N, c.N, 0);
          scatter(&c, to, out + place, at, 1);
        }
      }
    free(from);
    free(at);
  }
  free(sides);
  return failed;
}

/* dvalue, and partial sums of dweight (chunks, heads, N, N); one chunk per window if step > 0. */
I local_mlp_backward(const Map *grad, const Map *value, Map *dvalue, const REAL *weight,
                     REAL *dweight, I chunks, I step, I B, I H, I W, I heads, I D, I rows, I columns,
                     I down, I right, I threads) {
  Cut c = cut(B, H, W, heads, D, rows, columns, down, right);
  I C = heads * D, failed = 0;
  unsigned char *sides = sides_of(&c);
  if (!sides) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    I part = c.N * c.Dp, square = c.N * c.Np;
    REAL *from = allocate((3 * part + D * c.Np + 3 * square) * sizeof(REAL));
    REAL *to = from + part, *given = to + part, *turned = given + part;
    REAL *mixing = turned + D * c.Np, *one = mixing + square, *total = one + square;
    I *at = allocate(c.N * sizeof(I));
    failed = !from || !at;
#pragma omp for collapse(2) schedule(static)
    for (I chunk = 0; chunk < chunks; chunk++)
      for (I h = 0; h < heads; h++) {
        if (failed) continue;
        memset(total, 0, square * sizeof(REAL));
        for (I window = c.windows * chunk / chunks; window < c.windows * (chunk + 1) / chunks;
             window++) {
          I seam = seam_of(&c, window);
          places(&c, window, C, at);
          mix(&c, weight + window * step + h * c.N * c.N, sides, seam, mixing);
          memset(one, 0, square * sizeof(REAL));
          for (I b = 0; b < B; b++) {
            I place = b * H * W * C + h * D;
            gather(&c, grad + place, at, from, 1);
            gather(&c, value + place, at, given, 1);
            multiply(mixing, 1, c.Np, from, c.Dp, to, c.Dp, c.Dp, c.N, c.N, 0);
            scatter(&c, to, dvalue + place, at, 1);
            transpose(&c, given, turned);
            multiply(from, c.Dp, 1, turned, c.Np, one, c.Np, c.Np, c.N, D, 1);
          }
          for (I n = 0; n < c.N; n++)
            for (I m = 0; m < c.N; m++)
              total[n * c.Np + m] += (sides[n] ^ sides[m]) & seam ? 0 : one[n * c.Np + m];
        }
        for (I n = 0; n < c.N; n++)
          memcpy(dweight + ((chunk * heads + h) * c.N + n) * c.N, total + n * c.Np,
                 c.N * sizeof(REAL));
      }
    free(from);
    free(at);
  }
  free(sides);
  return failed;
}
