/* Static and dynamic depth-wise convolution, compiled by backbones.ops.native.

   Shared arguments: x, out and grad are contiguous maps (B, H, W, C); w and dw are taps
   (B or 1, K*K, C), with `step` elements from one image's taps to the next image's, 0 if shared;
   `before` is the zero padding before each axis; flip reverses the taps, for the map gradient. The
   order of sums does not depend on the number of threads: results are bitwise reproducible. */

#include "matrix.h"

/* N neighbouring outputs of row y from column `left` on, for the channels at c. */
#define DEPTHWISE_BLOCK(T)                                                                        \
  INLINE void depthwise_block_##T(const Map *x, const REAL *w, const REAL *bias, Map *out, I H,   \
                                  I W, I C, I K, I before, int flip, I y, I left, I c,            \
                                  const int N) {                                                  \
    T sum[8];                                                                                     \
    for (int i = 0; i < N; i++) sum[i] = bias ? AT(T, bias + c) : (T){0};                         \
    I first = N == 1 ? most(0, before - left) : 0, last = N == 1 ? least(K, W - left + before) : K;\
    for (I u = most(0, before - y); u < least(K, H - y + before); u++)                            \
      for (I v = first; v < last; v++) {                                                          \
        I tap = u * K + v;                                                                        \
        T weight = AT(T, w + (flip ? K * K - 1 - tap : tap) * C + c);                             \
        const Map *row = x + ((y + u - before) * W + left + v - before) * C + c;                  \
        for (int i = 0; i < N; i++) sum[i] += READ(T, row + i * C) * weight;                      \
      }                                                                                           \
    for (int i = 0; i < N; i++) WRITE(T, out + (y * W + left + i) * C + c, sum[i]);               \
  }
DEPTHWISE_BLOCK(Vec)
DEPTHWISE_BLOCK(One)

/* K = 7: eight outputs of a row, fewer where it ends (`edge`). Each element of x is loaded once for
   the seven taps of a kernel row. */
#define DEPTHWISE_SEVEN(T)                                                                        \
  INLINE void depthwise_seven_##T(const Map *x, const REAL *w, const REAL *bias, Map *out, I H,   \
                                  I W, I C, I before, int flip, I y, I left, I c,                 \
                                  const int edge) {                                               \
    T sum[8];                                                                                     \
    for (int i = 0; i < 8; i++) sum[i] = bias ? AT(T, bias + c) : (T){0};                         \
    for (I u = most(0, before - y); u < least(7, H - y + before); u++) {                          \
      const Map *row = x + ((y + u - before) * W + left - before) * C + c;                        \
      T weight[7];                                                                                \
      for (int v = 0; v < 7; v++) {                                                               \
        I tap = u * 7 + v;                                                                        \
        weight[v] = AT(T, w + (flip ? 48 - tap : tap) * C + c);                                   \
      }                                                                                           \
      _Pragma("GCC unroll 14") for (int i = 0; i < 14; i++) {                                     \
        if (edge && (left + i < before || left + i - before >= W)) continue;                      \
        T value = READ(T, row + i * C);                                                           \
        _Pragma("GCC unroll 7") for (int v = 0; v < 7; v++)                                       \
          if (i - v >= 0 && i - v < 8) sum[i - v] += value * weight[v];                           \
      }                                                                                           \
    }                                                                                             \
    for (int i = 0; i < (edge ? least(8, W - left) : 8); i++)                                     \
      WRITE(T, out + (y * W + left + i) * C + c, sum[i]);                                         \
  }
DEPTHWISE_SEVEN(Wide)
DEPTHWISE_SEVEN(Vec)

/* out[b, p, c] = bias[c] + sum over taps of x[b, p + tap, c] * w[b, tap, c]; bias may be NULL. */
I depthwise(const Map *x, Map *out, const REAL *w, const REAL *bias, I B, I H, I W, I C, I K,
            I before, I step, I flip, I threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (I b = 0; b < B; b++)
    for (I y = 0; y < H; y++) {
      const Map *xb = x + b * H * W * C;
      const REAL *wb = w + b * step;
      Map *ob = out + b * H * W * C;
      I whole = K == 7 ? C / LANES * LANES : 0;
      for (I left = 0; whole && left < W; left += 8) {
        /* The last block overlaps the one before it and writes the same values again. */
        I from = most(0, least(left, W - 8));
        int edge = from < before || from + 14 - before > W;
        I c = 0;
#define ALL_SEVEN(T, lanes)                                                                       \
  for (; c + lanes <= C; c += lanes)                                                              \
    if (edge)                                                                                     \
      depthwise_seven_##T(xb, wb, bias, ob, H, W, C, before, flip, y, from, c, 1);                \
    else                                                                                          \
      depthwise_seven_##T(xb, wb, bias, ob, H, W, C, before, flip, y, from, c, 0);
        ALL_SEVEN(Wide, SPAN)
        ALL_SEVEN(Vec, LANES)
      }
      for (I left = 0; left < W;) {
        int wide = left >= before && left + 8 + (K - 1 - before) <= W;
        I c = whole;
        for (; c + LANES <= C; c += LANES)
          if (wide)
            depthwise_block_Vec(xb, wb, bias, ob, H, W, C, K, before, flip, y, left, c, 8);
          else
            depthwise_block_Vec(xb, wb, bias, ob, H, W, C, K, before, flip, y, left, c, 1);
        for (; c < C; c++)
          for (I i = 0; i < (wide ? 8 : 1); i++)
            depthwise_block_One(xb, wb, bias, ob, H, W, C, K, before, flip, y, left + i, c, 1);
        left += wide ? 8 : 1;
      }
    }
  return 0;
}

#define DEPTHWISE_WEIGHT(T)                                                                       \
  INLINE void depthwise_weight_##T(const Map *x, const Map *grad, REAL *dw, I H, I W, I C,        \
                                   const I K, I before, I c) {                                    \
    for (I u = 0; u < K; u++)                                                                     \
      for (I y = most(0, before - u); y < least(H, H + before - u); y++) {                        \
        const Map *row = x + (y + u - before) * W * C + c, *g = grad + y * W * C + c;             \
        if (K == 7) {                                                                             \
          T sum[7];                                                                               \
          for (int v = 0; v < 7; v++) sum[v] = (T){0};                                            \
          I p = 0;                                                                                \
          for (; p < least(before, W); p++)                                                       \
            for (int v = 0; v < 7; v++)                                                           \
              if (p + v - before >= 0 && p + v - before < W)                                      \
                sum[v] += READ(T, row + (p + v - before) * C) * READ(T, g + p * C);               \
          for (; p + 13 - before < W; p += 8) {                                                   \
            T given[8];                                                                           \
            for (int i = 0; i < 8; i++) given[i] = READ(T, g + (p + i) * C);                      \
            _Pragma("GCC unroll 14") for (int i = 0; i < 14; i++) {                               \
              T value = READ(T, row + (p + i - before) * C);                                      \
              _Pragma("GCC unroll 7") for (int v = 0; v < 7; v++)                                 \
                if (i - v >= 0 && i - v < 8) sum[v] += value * given[i - v];                      \
            }                                                                                     \
          }                                                                                       \
          for (; p + 6 - before < W; p++) {                                                       \
            T value = READ(T, g + p * C);                                                         \
            for (int v = 0; v < 7; v++) sum[v] += READ(T, row + (p + v - before) * C) * value;    \
          }                                                                                       \
          for (; p < W; p++)                                                                      \
            for (int v = 0; v < 7; v++)                                                           \
              if (p + v - before < W)                                                             \
                sum[v] += READ(T, row + (p + v - before) * C) * READ(T, g + p * C);               \
          for (int v = 0; v < 7; v++) SET(T, dw + (u * 7 + v) * C + c) += sum[v];                 \
        } else                                                                                    \
          for (I v = 0; v < K; v++) {                                                             \
            T sum = (T){0};                                                                       \
            for (I p = most(0, before - v); p < least(W, W + before - v); p++)                    \
              sum += READ(T, row + (p + v - before) * C) * READ(T, g + p * C);                    \
            SET(T, dw + (u * K + v) * C + c) += sum;                                              \
          }                                                                                       \
      }                                                                                           \
  }
DEPTHWISE_WEIGHT(Wide)
DEPTHWISE_WEIGHT(Vec)
DEPTHWISE_WEIGHT(One)

/* dw[b, tap, c] += sum over p of x[b, p + tap, c] * grad[b, p, c], also over b if step is 0. */
I depthwise_weight(const Map *x, const Map *grad, REAL *dw, I B, I H, I W, I C, I K, I before,
                   I step, I threads) {
  I wide = C / SPAN, vectors = C % SPAN / LANES, blocks = wide + vectors + C % LANES;
  I kernels = step ? B : 1, shared = step ? 1 : B;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (I n = 0; n < kernels; n++)
    for (I block = 0; block < blocks; block++)
      for (I b = n * shared; b < (n + 1) * shared; b++) {
        const Map *xb = x + b * H * W * C, *gb = grad + b * H * W * C;
        if (block < wide)
          depthwise_weight_Wide(xb, gb, dw + n * step, H, W, C, K, before, block * SPAN);
        else if (block < wide + vectors)
          depthwise_weight_Vec(xb, gb, dw + n * step, H, W, C, K, before, wide * SPAN);
        else
          depthwise_weight_One(xb, gb, dw + n * step, H, W, C, K, before, C - (blocks - block));
      }
  return 0;
}
