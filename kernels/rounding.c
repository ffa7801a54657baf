/* Round to nearest on a group's minimum-maximum grid: reference.py's codes, scales and zero points, bit by bit.
 *
 * A row is widened to float32 once and stays in the cache while its groups are read three times: extremes, codes, and
 * the look for NaN and Inf on the way. Extremes are kept in lanes and compared by `a < b ? a : b`, which compilers turn
 * into vector instructions without being allowed to reorder anything.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define MIN_SCALE 5.9604644775390625e-8f /* 2^-24 */
#define MAX_SCALE 65504.0f

enum { FLOAT32, BFLOAT16, FLOAT16 };

static inline float clamp(float x, float low, float high)
{
    x = x < low ? low : x;
    return x > high ? high : x;
}

static void widen(const void *in, int type, int64_t n, float *out)
{
    if (type == BFLOAT16) {
        const uint16_t *x = in;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = (uint32_t)x[i] << 16;
            memcpy(out + i, &bits, 4);
        }
    } else {
        const _Float16 *x = in;
        for (int64_t i = 0; i < n; i++)
            out[i] = (float)x[i];
    }
}

static int odd(const float *w, int64_t n)
{
    uint32_t found = 0, bits;
    for (int64_t i = 0; i < n; i++) {
        memcpy(&bits, w + i, 4);
        found |= (bits & 0x7F800000u) == 0x7F800000u;
    }
    return found != 0;
}

static void extremes(const float *w, int64_t n, float *low, float *high)
{
    float a[LANES], b[LANES];
    int64_t i = 0;
    for (int k = 0; k < LANES; k++)
        a[k] = b[k] = w[0];
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) {
            float x = w[i + k];
            a[k] = x < a[k] ? x : a[k];
            b[k] = x > b[k] ? x : b[k];
        }
    for (; i < n; i++) {
        a[0] = w[i] < a[0] ? w[i] : a[0];
        b[0] = w[i] > b[0] ? w[i] : b[0];
    }
    *low = a[0], *high = b[0];
    for (int k = 1; k < LANES; k++) {
        *low = a[k] < *low ? a[k] : *low;
        *high = b[k] > *high ? b[k] : *high;
    }
}

/* (rows, cols) weights of `type`, `step` elements from row to row -> codes (rows, cols), scales and zeros (rows, groups).
 * `zeros` is NULL for symmetric grids. `scratch` holds a row. Returns 0 where a weight is NaN or Inf. */
int bitatlas_round(const void *weight, int type, int64_t rows, int64_t cols, int64_t step, int64_t group, int bits, float *scratch,
                   uint8_t *codes, uint16_t *scales, uint8_t *zeros)
{
    const float largest = (float)((1 << bits) - 1), middle = (float)(1 << (bits - 1));
    const int64_t size = type == FLOAT32 ? 4 : 2;
    for (int64_t r = 0; r < rows; r++) {
        const char *in = (const char *)weight + r * step * size;
        const float *w = (const float *)in;
        if (type != FLOAT32) {
            widen(in, type, cols, scratch);
            w = scratch;
        }
        if (odd(w, cols))
            return 0;
        for (int64_t j = 0; j < cols; j += group) {
            const int64_t n = cols - j < group ? cols - j : group;
            const float *g = w + j;
            float low, high, zero = middle, scale;
            extremes(g, n, &low, &high);
            if (zeros) {
                low = low > 0.0f ? 0.0f : low;
                high = high < 0.0f ? 0.0f : high;
                scale = (high - low) / largest;
            } else {
                high = -low > high ? -low : high;
                scale = high / (largest / 2);
            }
            const _Float16 half = (_Float16)clamp(scale, MIN_SCALE, MAX_SCALE);
            const float s = (float)half;
            memcpy(scales++, &half, 2);
            if (zeros) {
                zero = clamp(rintf(-low / s), 0.0f, largest);
                *zeros++ = (uint8_t)zero;
            }
            uint8_t *out = codes + r * cols + j;
            for (int64_t i = 0; i < n; i++)
                out[i] = (uint8_t)(int32_t)clamp(rintf(g[i] / s) + zero, 0.0f, largest);
        }
    }
    return 1;
}
