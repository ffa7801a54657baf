/* Bit packing: the layout of packing.py, eight codes at a time; and the look for NaN and Inf before it.
 *
 * Eight codes of one byte are one 64-bit lane, squeezed together in three steps; the `bits` bytes that come out are
 * stored eight wide, each store overwriting the idle end of the one before it. The tail of a row goes byte by byte,
 * because nothing may be written behind the row.
 */
#include <stdint.h>
#include <string.h>

static inline uint64_t squeeze(uint64_t x, int bits)
{
    x = (x & 0x00FF00FF00FF00FFull) | ((x & 0xFF00FF00FF00FF00ull) >> (8 - bits));
    x = (x & 0x0000FFFF0000FFFFull) | ((x & 0xFFFF0000FFFF0000ull) >> (16 - 2 * bits));
    return (x & 0x00000000FFFFFFFFull) | ((x & 0xFFFFFFFF00000000ull) >> (32 - 4 * bits));
}

static inline uint64_t spread(uint64_t x, int bits)
{
    const uint64_t low = (1ull << 4 * bits) - 1, pair = (1ull << 2 * bits) - 1, one = (1ull << bits) - 1;
    if (bits < 8)
        x &= (1ull << 8 * bits) - 1;
    x = (x & low) | ((x & ~low) << (32 - 4 * bits));
    x = (x & (pair * 0x100000001ull)) | ((x & (pair * 0x100000001ull) << 2 * bits) << (16 - 2 * bits));
    return (x & (one * 0x1000100010001ull)) | ((x & (one * 0x1000100010001ull) << bits) << (8 - bits));
}

static inline uint64_t pack_row(const uint8_t *codes, int64_t cols, int bits, uint8_t *out, int64_t bytes)
{
    uint64_t all = 0, x;
    int64_t j = 0, at = 0;
    for (; j + 8 <= cols && at + 8 <= bytes; j += 8, at += bits) {
        memcpy(&x, codes + j, 8);
        all |= x;
        x = squeeze(x, bits);
        memcpy(out + at, &x, 8);
    }
    for (; at < bytes; j += 8, at += bits) {
        x = 0;
        if (j < cols)
            memcpy(&x, codes + j, cols - j < 8 ? cols - j : 8);
        all |= x;
        x = squeeze(x, bits);
        memcpy(out + at, &x, bytes - at < bits ? bytes - at : bits);
    }
    return all;
}

static inline void unpack_row(const uint8_t *in, int64_t bytes, int bits, uint8_t *codes, int64_t cols)
{
    uint64_t x;
    int64_t j = 0, at = 0;
    for (; j + 8 <= cols && at + 8 <= bytes; j += 8, at += bits) {
        memcpy(&x, in + at, 8);
        x = spread(x, bits);
        memcpy(codes + j, &x, 8);
    }
    for (; j < cols; j += 8, at += bits) {
        x = 0;
        memcpy(&x, in + at, bytes - at < bits ? bytes - at : bits);
        x = spread(x, bits);
        memcpy(codes + j, &x, cols - j < 8 ? cols - j : 8);
    }
}

/* The width has to be a constant in the inner loops. */
#define FOR_WIDTHS(DO) \
    switch (bits) {    \
    case 1: DO(1)      \
    case 2: DO(2)      \
    case 3: DO(3)      \
    case 4: DO(4)      \
    case 5: DO(5)      \
    case 6: DO(6)      \
    case 7: DO(7)      \
    default: DO(8)     \
    }

/* (rows, cols) codes with `step` bytes from row to row -> rows of `words` 32-bit words; all codes or'ed together. */
int bitatlas_pack(const uint8_t *codes, int64_t rows, int64_t cols, int64_t step, int bits, uint8_t *out, int64_t words)
{
    uint64_t all = 0;
#define PACK(B)                                                                       \
    for (int64_t r = 0; r < rows; r++)                                                \
        all |= pack_row(codes + r * step, cols, B, out + r * words * 4, words * 4);   \
    break;
    FOR_WIDTHS(PACK)
    all |= all >> 32;
    all |= all >> 16;
    return (int)((all | all >> 8) & 0xFF);
}

void bitatlas_unpack(const uint8_t *in, int64_t rows, int64_t words, int bits, uint8_t *codes, int64_t cols)
{
#define UNPACK(B)                                                                     \
    for (int64_t r = 0; r < rows; r++)                                                \
        unpack_row(in + r * words * 4, words * 4, B, codes + r * cols, cols);         \
    break;
    FOR_WIDTHS(UNPACK)
}

/* Whether none of `count` float32 is NaN or Inf. */
int bitatlas_finite(const uint32_t *in, int64_t count)
{
    uint32_t odd = 0;
    for (int64_t i = 0; i < count; i++)
        odd |= (in[i] & 0x7F800000u) == 0x7F800000u;
    return !odd;
}
