/* Depth-wise operators on channels-last maps, built on first use by backbones.ops.native.

   REAL is float or double. Maps are (rows, columns, channels) of an image, contiguous; `before` is
   the number of zeros that padding puts before an axis. No loop depends on the number of threads
   in the order of its sums, so results repeat bit for bit.
   Inhomogeneous maps hold channels group-innermost, (rows, columns, S, G): the G numbers that
   neighbouring kernels multiply lie side by side. */

#include <stdint.h>

typedef int64_t I;
typedef REAL Vec __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
typedef REAL One;
#define LANES ((I)(32 / sizeof(REAL)))
#define INLINE static inline __attribute__((always_inline))
#define AT(T, pointer) (*(const T *)(pointer))
#define LOAD(pointer) AT(Vec, pointer)
#define SET(T, pointer) (*(T *)(pointer))

INLINE I least(I a, I b) { return a < b ? a : b; }
INLINE I most(I a, I b) { return a > b ? a : b; }

/* N neighbouring outputs of one row, for the channels at c. */
#define DEPTHWISE_BLOCK(T)                                                                        \
  INLINE void depthwise_block_##T(const REAL *x, const REAL *w, const REAL *bias, REAL *out, I H, \
                                  I W, I C, I K, I before, int flip, I y, I left, I c,            \
                                  const int N) {                                                  \
    T sum[8];                                                                                     \
    for (int i = 0; i < N; i++) sum[i] = bias ? AT(T, bias + c) : (T){0};                         \
    I first = N == 1 ? most(0, before - left) : 0, last = N == 1 ? least(K, W - left + before) : K;\
    for (I u = most(0, before - y); u < least(K, H - y + before); u++)                            \
      for (I v = first; v < last; v++) {                                                          \
        I tap = u * K + v;                                                                        \
        T weight = AT(T, w + (flip ? K * K - 1 - tap : tap) * C + c);                             \
        const REAL *row = x + ((y + u - before) * W + left + v - before) * C + c;                 \
        for (int i = 0; i < N; i++) sum[i] += AT(T, row + i * C) * weight;                        \
      }                                                                                           \
    for (int i = 0; i < N; i++) SET(T, out + (y * W + left + i) * C + c) = sum[i];                \
  }
DEPTHWISE_BLOCK(Vec)
DEPTHWISE_BLOCK(One)

/* Eight outputs of one row by kernels of 7, fewer where the row ends: every number is loaded once a
   row of the kernel. */
INLINE void depthwise_seven(const REAL *x, const REAL *w, const REAL *bias, REAL *out, I H, I W, I C,
                            I before, int flip, I y, I left, I c, const int edge) {
  Vec sum[8];
  for (int i = 0; i < 8; i++) sum[i] = bias ? LOAD(bias + c) : (Vec){0};
  for (I u = most(0, before - y); u < least(7, H - y + before); u++) {
    const REAL *row = x + ((y + u - before) * W + left - before) * C + c;
    Vec weight[7];
    for (int v = 0; v < 7; v++) {
      I tap = u * 7 + v;
      weight[v] = LOAD(w + (flip ? 48 - tap : tap) * C + c);
    }
#pragma GCC unroll 14
    for (int i = 0; i < 14; i++) {
      if (edge && (left + i < before || left + i - before >= W)) continue;
      Vec value = LOAD(row + i * C);
#pragma GCC unroll 7
      for (int v = 0; v < 7; v++)
        if (i - v >= 0 && i - v < 8) sum[i - v] += value * weight[v];
    }
  }
  for (int i = 0; i < (edge ? least(8, W - left) : 8); i++)
    SET(Vec, out + (y * W + left + i) * C + c) = sum[i];
}

/* out[b, p, c] = bias[c] + sum over taps of x[b, p + tap, c] * w[b, tap, c]; w of one image for all
   where step is 0. */
I depthwise(const REAL *x, const REAL *w, const REAL *bias, REAL *out, I B, I H, I W, I C, I K,
            I before, I step, I flip, I threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (I b = 0; b < B; b++)
    for (I y = 0; y < H; y++) {
      const REAL *xb = x + b * H * W * C, *wb = w + b * step;
      REAL *ob = out + b * H * W * C;
      I whole = K == 7 ? C / LANES * LANES : 0;
      for (I left = 0; whole && left < W; left += 8) {
        /* The last eight overlap their neighbours: the same is written again. */
        I from = most(0, least(left, W - 8));
        int edge = from < before || from + 14 - before > W;
        for (I c = 0; c < whole; c += LANES)
          if (edge)
            depthwise_seven(xb, wb, bias, ob, H, W, C, before, flip, y, from, c, 1);
          else
            depthwise_seven(xb, wb, bias, ob, H, W, C, before, flip, y, from, c, 0);
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
  INLINE void depthwise_weight_##T(const REAL *x, const REAL *grad, REAL *dw, I H, I W, I C,      \
                                   const I K, I before, I c) {                                    \
    for (I u = 0; u < K; u++)                                                                     \
      for (I y = most(0, before - u); y < least(H, H + before - u); y++) {                        \
        const REAL *row = x + (y + u - before) * W * C + c, *g = grad + y * W * C + c;            \
        if (K == 7) {                                                                             \
          T sum[7];                                                                               \
          for (int v = 0; v < 7; v++) sum[v] = (T){0};                                            \
          I p = 0;                                                                                \
          for (; p < least(before, W); p++)                                                       \
            for (int v = 0; v < 7; v++)                                                           \
              if (p + v - before >= 0 && p + v - before < W)                                      \
                sum[v] += AT(T, row + (p + v - before) * C) * AT(T, g + p * C);                   \
          for (; p + 13 - before < W; p += 8) {                                                   \
            T given[8];                                                                           \
            for (int i = 0; i < 8; i++) given[i] = AT(T, g + (p + i) * C);                        \
            _Pragma("GCC unroll 14") for (int i = 0; i < 14; i++) {                               \
              T value = AT(T, row + (p + i - before) * C);                                        \
              _Pragma("GCC unroll 7") for (int v = 0; v < 7; v++)                                                         \
                if (i - v >= 0 && i - v < 8) sum[v] += value * given[i - v];                      \
            }                                                                                     \
          }                                                                                       \
          for (; p + 6 - before < W; p++) {                                                       \
            T value = AT(T, g + p * C);                                                           \
            for (int v = 0; v < 7; v++) sum[v] += AT(T, row + (p + v - before) * C) * value;      \
          }                                                                                       \
          for (; p < W; p++)                                                                      \
            for (int v = 0; v < 7; v++)                                                           \
              if (p + v - before < W)                                                             \
                sum[v] += AT(T, row + (p + v - before) * C) * AT(T, g + p * C);                   \
          for (int v = 0; v < 7; v++) SET(T, dw + (u * 7 + v) * C + c) += sum[v];                 \
        } else                                                                                    \
          for (I v = 0; v < K; v++) {                                                             \
            T sum = (T){0};                                                                       \
            for (I p = most(0, before - v); p < least(W, W + before - v); p++)                    \
              sum += AT(T, row + (p + v - before) * C) * AT(T, g + p * C);                        \
            SET(T, dw + (u * K + v) * C + c) += sum;                                              \
          }                                                                                       \
      }                                                                                           \
  }
DEPTHWISE_WEIGHT(Vec)
DEPTHWISE_WEIGHT(One)

/* dw[b, tap, c] += sum over p of x[b, p + tap, c] * grad[b, p, c], over images too where step is 0.
 */
I depthwise_weight(const REAL *x, const REAL *grad, REAL *dw, I B, I H, I W, I C, I K, I before,
                   I step, I threads) {
  I blocks = C / LANES + C % LANES, kernels = step ? B : 1, shared = step ? 1 : B;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (I n = 0; n < kernels; n++)
    for (I block = 0; block < blocks; block++)
      for (I b = n * shared; b < (n + 1) * shared; b++) {
        const REAL *xb = x + b * H * W * C, *gb = grad + b * H * W * C;
        I c = block < C / LANES ? block * LANES : C - (blocks - block);
        if (block < C / LANES)
          depthwise_weight_Vec(xb, gb, dw + n * step, H, W, C, K, before, c);
        else
          depthwise_weight_One(xb, gb, dw + n * step, H, W, C, K, before, c);
      }
  return 0;
}

/* One position, the groups at g, N of its S shared channels from j on. */
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

/* Rows first..last of an image: x padded (H + K - 1, W + K - 1, S, G), kernels (rows, W, K*K, G) of
   those rows alone, out (H, W, S, G). */
I aggregate(const REAL *x, const REAL *kernels, REAL *out, I first, I last, I W, I S, I G, I K,
            I threads) {
  I Wp = W + K - 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (I p = first * W; p < last * W; p++) {
    const REAL *from = x + (p / W * Wp + p % W) * S * G, *kernel = kernels + (p - first * W) * K * K * G;
    I g = 0;
    for (; g + LANES <= G; g += LANES)
      if (K == 7)
        aggregate_all_Vec(from, kernel, out + p * S * G, Wp, S, G, 7, g);
      else
        aggregate_all_Vec(from, kernel, out + p * S * G, Wp, S, G, K, g);
    for (; g < G; g++) aggregate_all_One(from, kernel, out + p * S * G, Wp, S, G, K, g);
  }
  return 0;
}

#define KERNEL_GRADIENT(T)                                                                        \
  INLINE void kernel_gradient_##T(const REAL *x, const REAL *grad, REAL *dk, I Wp, I S, I G, I K, \
                                  I g) {                                                          \
    for (I u = 0; u < K; u++)                                                                     \
      for (I v = 0; v < K; v++) {                                                                 \
        const REAL *from = x + (u * Wp + v) * S * G + g;                                          \
        T sum = AT(T, from) * AT(T, grad + g);                                                    \
        for (I j = 1; j < S; j++) sum += AT(T, from + j * G) * AT(T, grad + j * G + g);           \
        SET(T, dk + (u * K + v) * G + g) = sum;                                                   \
      }                                                                                           \
  }
KERNEL_GRADIENT(Vec)
KERNEL_GRADIENT(One)

/* The gradient of those rows' kernels, (rows, W, K*K, G); grad is (H, W, S, G). */
I kernel_gradient(const REAL *x, const REAL *grad, REAL *dk, I first, I last, I W, I S, I G, I K,
                  I threads) {
  I Wp = W + K - 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (I p = first * W; p < last * W; p++) {
    const REAL *from = x + (p / W * Wp + p % W) * S * G;
    REAL *to = dk + (p - first * W) * K * K * G;
    I g = 0;
    for (; g + LANES <= G; g += LANES) kernel_gradient_Vec(from, grad + p * S * G, to, Wp, S, G, K, g);
    for (; g < G; g++) kernel_gradient_One(from, grad + p * S * G, to, Wp, S, G, K, g);
  }
  return 0;
}

#define SPREAD(T)                                                                                 \
  INLINE void spread_##T(const REAL *grad, const REAL *kernels, REAL *dx, I first, I last, I W,   \
                         I S, I G, I K, I y, I left, I j, I g, const int N) {                     \
    T sum[4];                                                                                     \
    for (int i = 0; i < N; i++) sum[i] = AT(T, dx + (j + i) * G + g);                             \
    for (I u = most(0, y - last + 1); u <= least(K - 1, y - first); u++)                          \
      for (I v = most(0, left - W + 1); v <= least(K - 1, left); v++) {                           \
        I p = (y - u) * W + left - v;                                                             \
        T weight = AT(T, kernels + ((p - first * W) * K * K + u * K + v) * G + g);                \
        const REAL *from = grad + p * S * G + j * G + g;                                          \
        for (int i = 0; i < N; i++) sum[i] += AT(T, from + i * G) * weight;                       \
      }                                                                                           \
    for (int i = 0; i < N; i++) SET(T, dx + (j + i) * G + g) = sum[i];                            \
  }                                                                                               \
  INLINE void spread_all_##T(const REAL *grad, const REAL *kernels, REAL *dx, I first, I last,    \
                             I W, I S, I G, I K, I y, I left, I g) {                              \
    I j = 0;                                                                                      \
    for (; j + 4 <= S; j += 4) spread_##T(grad, kernels, dx, first, last, W, S, G, K, y, left, j, g, 4); \
    if (S - j == 3) spread_##T(grad, kernels, dx, first, last, W, S, G, K, y, left, j, g, 3);     \
    if (S - j == 2) spread_##T(grad, kernels, dx, first, last, W, S, G, K, y, left, j, g, 2);     \
    if (S - j == 1) spread_##T(grad, kernels, dx, first, last, W, S, G, K, y, left, j, g, 1);     \
  }
SPREAD(Vec)
SPREAD(One)

/* dx, padded as x is, gains what those rows' outputs say: gathered, so no two threads meet. */
I spread(const REAL *grad, const REAL *kernels, REAL *dx, I first, I last, I W, I S, I G, I K,
         I threads) {
  I Wp = W + K - 1;
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads)
  for (I q = first * Wp; q < (last + K - 1) * Wp; q++) {
    I y = q / Wp, left = q % Wp, g = 0;
    for (; g + LANES <= G; g += LANES)
      if (K == 7)
        spread_all_Vec(grad, kernels, dx + q * S * G, first, last, W, S, G, 7, y, left, g);
      else
        spread_all_Vec(grad, kernels, dx + q * S * G, first, last, W, S, G, K, y, left, g);
    for (; g < G; g++)
      spread_all_One(grad, kernels, dx + q * S * G, first, last, W, S, G, K, y, left, g);
  }
  return 0;
}
