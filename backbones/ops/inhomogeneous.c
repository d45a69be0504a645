/* Depth-wise convolution with a kernel at every position, compiled by backbones.ops.native.

   Maps are (B, H, W, S, G), C = G * S; groups are innermost, as in kernels (K*K, G), so that both
   are read as vectors. x and dx are zero-padded to (B, H + K - 1, W + K - 1, S, G), of width Wp.
   The order of sums does not depend on the number of threads: results are bitwise reproducible.
   Functions return 1 if malloc fails. */

#include "matrix.h"

#include <stdlib.h>
#include <string.h>

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

INLINE void aggregate_at(const REAL *x, const REAL *kernel, REAL *out, I Wp, I S, I G, I K) {
  I g = 0;
  for (; g + LANES <= G; g += LANES)
    if (K == 7)
      aggregate_all_Vec(x, kernel, out, Wp, S, G, 7, g);
    else
      aggregate_all_Vec(x, kernel, out, Wp, S, G, K, g);
  for (; g < G; g++) aggregate_all_One(x, kernel, out, Wp, S, G, K, g);
}

/* Positions whose kernels are predicted at a time, so that they stay in a core's cache. */
#define TOGETHER ((I)24)

/* Convolve x with the kernels hidden @ matrix + offset. hidden is (B, H, W, Dp), matrix (D, width),
   offset (width); Dp and width are D and K*K*G padded to whole vectors. */
I predict_and_aggregate(const REAL *x, const REAL *hidden, const REAL *matrix, const REAL *offset,
                        REAL *out, I B, I H, I W, I S, I G, I K, I D, I Dp, I width, I threads) {
  I Wp = W + K - 1, failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    REAL *kernels = malloc(TOGETHER * width * sizeof(REAL));
    failed = !kernels;
#pragma omp for collapse(2) schedule(static)
    for (I b = 0; b < B; b++)
      for (I y = 0; y < H; y++)
        for (I left = 0; left < W && !failed; left += TOGETHER) {
          I n = least(TOGETHER, W - left), p = (b * H + y) * W + left;
          const REAL *from = x + ((b * (H + K - 1) + y) * Wp + left) * S * G;
          multiply_from(hidden + p * Dp, Dp, 1, matrix, width, kernels, width, width, n, D, 0, offset);
          for (I i = 0; i < n; i++)
            aggregate_at(from + i * S * G, kernels + i * width, out + (p + i) * S * G, Wp, S, G, K);
        }
    free(kernels);
  }
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

INLINE void spread_at(const REAL *x, const REAL *grad, REAL *dx, REAL *kernel, I Wp, I S, I G, I K) {
  I g = 0;
  for (; g + LANES <= G; g += LANES)
    if (K == 7 && S == 3)
      spread_Vec(x, grad, dx, kernel, Wp, 3, G, 7, g, 3);
    else if (K == 7)
      spread_Vec(x, grad, dx, kernel, Wp, S, G, 7, g, 0);
    else
      spread_Vec(x, grad, dx, kernel, Wp, S, G, K, g, 0);
  for (; g < G; g++) spread_One(x, grad, dx, kernel, Wp, S, G, K, g, 0);
}

/* The gradients. dx must be zero on entry; back is matrix transposed, (width, Dp). dmatrix (groups,
   strips, width, Dp) and doffset (groups, strips, width) are partial sums over groups of images and
   strips of rows. A strip also writes K - 1 rows of dx that belong to the next strip, so even and
   odd strips run one after the other; each has at least K - 1 rows. */
I predict_and_aggregate_backward(const REAL *grad, const REAL *x, const REAL *hidden,
                                 const REAL *matrix, const REAL *offset, const REAL *back, REAL *dx,
                                 REAL *dhidden, REAL *dmatrix, REAL *doffset, I groups, I strips, I B,
                                 I H, I W, I S, I G, I K, I D, I Dp, I width, I threads) {
  I Wp = W + K - 1, failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    REAL *kernels = malloc(TOGETHER * width * sizeof(REAL));
    failed = !kernels;
    for (I parity = 0; parity < 2; parity++)
#pragma omp for collapse(2) schedule(static, 1)
      for (I group = 0; group < groups; group++)
        for (I strip = parity; strip < strips; strip += 2) {
          REAL *dm = dmatrix + (group * strips + strip) * width * Dp;
          REAL *df = doffset + (group * strips + strip) * width;
          memset(dm, 0, width * Dp * sizeof(REAL));
          memset(df, 0, width * sizeof(REAL));
          for (I b = B * group / groups; b < B * (group + 1) / groups; b++)
            for (I y = H / strips * strip; y < (strip + 1 < strips ? H / strips * (strip + 1) : H); y++)
              for (I left = 0; left < W && !failed; left += TOGETHER) {
                I n = least(TOGETHER, W - left), p = (b * H + y) * W + left;
                I place = ((b * (H + K - 1) + y) * Wp + left) * S * G;
                const REAL *h = hidden + p * Dp;
                multiply_from(h, Dp, 1, matrix, width, kernels, width, width, n, D, 0, offset);
                for (I i = 0; i < n; i++)
                  spread_at(x + place + i * S * G, grad + (p + i) * S * G, dx + place + i * S * G,
                            kernels + i * width, Wp, S, G, K);
                multiply(kernels, width, 1, back, Dp, dhidden + p * Dp, Dp, Dp, n, width, 0);
                multiply(kernels, 1, width, h, Dp, dm, Dp, Dp, width, n, 1);
                for (I i = 0; i < n; i++)
                  for (I t = 0; t < width; t += LANES)
                    STORE(df + t) += LOAD(kernels + i * width + t);
              }
        }
    free(kernels);
  }
  return failed;
}

/* Transpose one position's kernels, (G, K*K) to (K*K, G), and back. */
INLINE void by_tap(const REAL *given, REAL *kernel, I G, I taps) {
  for (I g = 0; g < G; g++)
    for (I t = 0; t < taps; t++) kernel[t * G + g] = given[g * taps + t];
}
INLINE void by_group(const REAL *kernel, REAL *given, I G, I taps) {
  for (I g = 0; g < G; g++)
    for (I t = 0; t < taps; t++) given[g * taps + t] = kernel[t * G + g];
}

/* Convolve x with given kernels (B, H, W, G, K*K). */
I aggregate(const REAL *x, const REAL *given, REAL *out, I B, I H, I W, I S, I G, I K, I threads) {
  I Wp = W + K - 1, many = K * K * G, failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    REAL *kernel = malloc(many * sizeof(REAL));
    failed = !kernel;
#pragma omp for collapse(2) schedule(static)
    for (I b = 0; b < B; b++)
      for (I y = 0; y < H; y++)
        for (I left = 0; left < W && !failed; left++) {
          I p = (b * H + y) * W + left;
          by_tap(given + p * many, kernel, G, K * K);
          aggregate_at(x + ((b * (H + K - 1) + y) * Wp + left) * S * G, kernel, out + p * S * G, Wp,
                       S, G, K);
        }
    free(kernel);
  }
  return failed;
}

/* dx, zero on entry, and dgiven; strips as in predict_and_aggregate_backward. */
I aggregate_backward(const REAL *grad, const REAL *x, const REAL *given, REAL *dx, REAL *dgiven,
                     I strips, I B, I H, I W, I S, I G, I K, I threads) {
  I Wp = W + K - 1, many = K * K * G, failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    REAL *kernel = malloc(many * sizeof(REAL));
    failed = !kernel;
    for (I parity = 0; parity < 2; parity++)
#pragma omp for collapse(2) schedule(static, 1)
      for (I b = 0; b < B; b++)
        for (I strip = parity; strip < strips; strip += 2)
          for (I y = H / strips * strip; y < (strip + 1 < strips ? H / strips * (strip + 1) : H); y++)
            for (I left = 0; left < W && !failed; left++) {
              I p = (b * H + y) * W + left, place = ((b * (H + K - 1) + y) * Wp + left) * S * G;
              by_tap(given + p * many, kernel, G, K * K);
              spread_at(x + place, grad + p * S * G, dx + place, kernel, Wp, S, G, K);
              by_group(kernel, dgiven + p * many, G, K * K);
            }
    free(kernel);
  }
  return failed;
}
