/* y[m, n] = sum_k x[m, k] * (code[n, k] - zero[n, g]) * scale[n, g] for a few rows of x, the codes staying packed; or the
 * same with table[code[n, k]] for formats with a table of 16 or 256 entries.
 *
 * Eight codes of b bits are b whole bytes, so they are spread over eight bytes by one bit-deposit instruction (or three
 * shift-and-mask steps). Zero points are factored out: a group's sum of x is known beforehand.
 * Compiled by kernels/cpu.py with the machine's own compiler; the torch path does the same without.
 */
#include <stdint.h>
#include <string.h>
#if defined(__BMI2__) || defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define LANES 16 /* columns decoded at a time */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

static inline uint64_t spread(uint64_t v, int bits) {
#if defined(__BMI2__)
    return _pdep_u64(v, (uint64_t)((1u << bits) - 1) * 0x0101010101010101ull);
#else
    uint64_t m = (1ull << bits) - 1, m2 = (1ull << 2 * bits) - 1, m4 = bits == 8 ? 0xffffffffull : (1ull << 4 * bits) - 1;
    v = (v & m4) | ((v & (m4 << 4 * bits)) << (32 - 4 * bits));
    v = (v & (m2 * 0x100000001ull)) | ((v & ((m2 << 2 * bits) * 0x100000001ull)) << (16 - 2 * bits));
    return (v & (m * 0x1000100010001ull)) | ((v & ((m << bits) * 0x1000100010001ull)) << (8 - bits));
#endif
}

static inline float half(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023, out;
    float f;
    if (exponent == 0) return (sign ? -1.f : 1.f) * fraction * 0x1p-24f;
    out = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    memcpy(&f, &out, 4);
    return f;
#endif
}

/* Eight bytes at `byte` of a row, zeros beyond its end. */
static inline uint64_t bytes_at(const uint8_t *row, int64_t size, int64_t byte) {
    uint64_t v = 0;
    int64_t left = size - byte;
    if (left >= 8) memcpy(&v, row + byte, 8);
    else if (left > 0) for (int i = 0; i < (int)left; i++) v |= (uint64_t)row[byte + i] << 8 * i;
    return v;
}

static inline uint32_t value_at(const uint8_t *stream, int64_t size, int64_t at, int bits) {
    return (uint32_t)(bytes_at(stream, size, at >> 3) >> (at & 7)) & ((1u << bits) - 1);
}

#if defined(__AVX512F__)
/* E4M3 by its bits, several times faster than a gather from its table; to the last bit the same. */
static inline __m512 e4m3(__m512i code) {
    __m512i size = _mm512_and_si512(code, _mm512_set1_epi32(127));
    __m512 v = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(size, 20), _mm512_set1_epi32(120 << 23)));
    __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(size), _mm512_set1_ps(0x1p-9f)); /* subnormals */
    v = _mm512_mask_mov_ps(v, _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(8)), small);
    v = _mm512_mask_mov_ps(v, _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(127)), _mm512_set1_ps(__builtin_nanf("")));
    __m512i sign = _mm512_slli_epi32(_mm512_xor_si512(code, size), 24);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(v), sign));
}
#endif

/* Sixteen codes from column `first` on, a multiple of 8, as floats: their numbers, or their entries in a table. */
static inline __attribute__((always_inline)) lanes decode(const uint8_t *row, int64_t size, int64_t first, int bits,
                                                          const float *table, const int entries) {
    uint64_t low = spread(bytes_at(row, size, first / 8 * bits), bits);
    uint64_t high = spread(bytes_at(row, size, first / 8 * bits + bits), bits);
    lanes out;
#if defined(__AVX512F__)
    __m512i code = _mm512_cvtepu8_epi32(_mm_set_epi64x((int64_t)high, (int64_t)low));
    __m512 v = entries == 16    ? _mm512_permutexvar_ps(code, _mm512_loadu_ps(table))
               : entries == 256 ? e4m3(code)
                                : _mm512_cvtepi32_ps(code);
    memcpy(&out, &v, sizeof out);
#elif defined(__AVX2__)
    __m256i code[2] = {_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)low)),
                       _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)high))};
    __m256 v[2];
    for (int h = 0; h < 2; h++) {
        if (entries == 16) /* bit 3 of a code says which half of the table */
            v[h] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), code[h]),
                                    _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), code[h]),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(code[h], 28)));
        else
            v[h] = entries == 256 ? _mm256_i32gather_ps(table, code[h], 4) : _mm256_cvtepi32_ps(code[h]);
    }
    memcpy(&out, v, sizeof out);
#else
    for (int l = 0; l < 8; l++) {
        int a = low >> 8 * l & 255, b = high >> 8 * l & 255;
        out[l] = entries ? table[a] : (float)a;
        out[l + 8] = entries ? table[b] : (float)b;
    }
#endif
    return out;
}

struct problem {
    const uint8_t *codes, *zeros;
    const void *scales;
    const float *x, *sums, *table;
    float *y;
    int64_t row_bytes, zero_bytes, n, k, group, groups, scale_step;
    int exponents;
};

/* The scale at a place: float16, or a power of two as its exponent (E8M0). */
static inline float scale_at(const struct problem *p, int64_t at) {
    if (!p->exponents) return half(((const uint16_t *)p->scales)[at]);
    uint32_t e = ((const uint8_t *)p->scales)[at], bits = e ? e << 23 : 1u << 22; /* 2^-127 is no normal float */
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* One row of W against m rows of x; m and the size of the table (0: none) are constants wherever this is inlined. */
static inline __attribute__((always_inline)) void one_row(const struct problem *p, int64_t r, const int m, int bits,
                                                          const int entries) {
    const uint8_t *row = p->codes + r * p->row_bytes;
    lanes total[8] = {{0}};
    float constant[8] = {0};
    for (int64_t g = 0; g < p->groups; g++) {
        int64_t start = g * p->group, stop = start + p->group < p->k ? start + p->group : p->k, c = start;
        float scale = scale_at(p, r * p->scale_step + g);
        float zero = entries ? 0 : p->zeros ? (float)value_at(p->zeros, p->zero_bytes, (r * p->groups + g) * bits, bits)
                              : (float)(1 << (bits - 1));
        lanes dot[8] = {{0}};
        for (; c + LANES <= stop; c += LANES) {
            lanes w = decode(row, p->row_bytes, c, bits, p->table, entries);
            for (int i = 0; i < m; i++) dot[i] += *(const lanes *)(p->x + i * p->k + c) * w;
        }
        if (c < stop) {
            lanes w = decode(row, p->row_bytes, c, bits, p->table, entries);
            for (int i = 0; i < m; i++)
                for (int l = 0; l < (int)(stop - c); l++) dot[i][l] += p->x[i * p->k + c + l] * w[l];
        }
        for (int i = 0; i < m; i++) {
            total[i] += dot[i] * scale;
            if (!entries) constant[i] += scale * zero * p->sums[i * p->groups + g];
        }
    }
    for (int i = 0; i < m; i++) {
        float sum = 0;
        for (int l = 0; l < LANES; l++) sum += total[i][l];
        p->y[i * p->n + r] = sum - constant[i];
    }
}

#define ROWS(M, ENTRIES, BITS)                                            \
    case M: {                                                             \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") \
        for (int64_t r = 0; r < n; r++) one_row(&p, r, M, BITS, ENTRIES); \
        break;                                                            \
    }
#define ALL_ROWS(E, B)                                              \
    switch (m) {                                                    \
        ROWS(1, E, B) ROWS(2, E, B) ROWS(3, E, B) ROWS(4, E, B)     \
        ROWS(5, E, B) ROWS(6, E, B) ROWS(7, E, B) ROWS(8, E, B)     \
    }

/* m is 1 to 8; group is a multiple of 8 or k. sums has room for m * groups. */
void bitatlas_linear(const uint8_t *codes, int64_t row_bytes, const uint16_t *scales, const uint8_t *zeros,
                     int64_t zero_bytes, const float *x, float *sums, float *y, int64_t m, int64_t n, int64_t k,
                     int64_t group, int bits, int threads) {
    int64_t groups = (k + group - 1) / group;
    struct problem p = {codes, zeros, scales, x, sums, 0, y, row_bytes, zero_bytes, n, k, group, groups, groups, 0};
    for (int64_t i = 0; i < m; i++)
        for (int64_t g = 0; g < groups; g++) {
            float s = 0;
            int64_t stop = (g + 1) * group < k ? (g + 1) * group : k;
            for (int64_t c = g * group; c < stop; c++) s += x[i * k + c];
            sums[i * groups + g] = s;
        }
    ALL_ROWS(0, bits)
}

/* The same with a table of 1 << bits entries, bits 4 or 8; that of 256 is E4M3's. scale_step: scales from row to row, 0 for one of the whole
 * matrix; exponents: they are E8M0 bytes. */
void bitatlas_table_linear(const uint8_t *codes, int64_t row_bytes, const void *scales, int64_t scale_step, int exponents,
                           const float *table, const float *x, float *y, int64_t m, int64_t n, int64_t k, int64_t group,
                           int bits, int threads) {
    struct problem p = {codes, 0, scales, x, 0, table, y, row_bytes, 0, n, k, group, (k + group - 1) / group, scale_step, exponents};
    if (bits == 4) ALL_ROWS(16, 4)
    else ALL_ROWS(256, 8)
}
