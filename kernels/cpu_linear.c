/* y[m, n] = sum_k x[m, k] * (code[n, k] - zero[n, g]) * scale[n, g] for a few rows of x, the codes staying packed; or the
 * same with table[code[n, k]] for formats with a table of 16 or 256 entries.
 *
 * Some rows of W go together, so that x is loaded once for them, 32 columns at a time. Eight codes of b bits are b whole
 * bytes, so they are spread over eight bytes by one bit-deposit instruction (or three shift-and-mask steps). Of codes of 4
 * bits the low halves of the bytes are the even columns and the high ones the odd; x is put into that order beforehand, so
 * that nothing is spread. (code - zero) * scale has fewer than 24 bits, so weights are exact floats.
 * Compiled by kernels/cpu.py with the machine's own compiler; the torch path does the same without.
 */
#include <stdint.h>
#include <string.h>
#if defined(__BMI2__) || defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define CHUNK 32 /* columns decoded at a time */
#define BLOCK 16 /* groups whose scales are read at a time */
#if defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define PIECES (CHUNK / LANES)
#if defined(__AVX2__)
#define SPLIT 1 /* x for codes of 4 bits: even columns, then odd ones, of each 2 * LANES */
#else
#define SPLIT 0
#endif
#define UNROLL _Pragma("GCC unroll 8") /* or sums would lie in memory */
#define INLINE static inline __attribute__((always_inline))

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

/* Eight bytes at `byte` of a stream, zeros beyond its end. */
static inline uint64_t bytes_at(const uint8_t *stream, int64_t size, int64_t byte) {
    uint64_t v = 0;
    int64_t left = size - byte;
    if (left >= 8) memcpy(&v, stream + byte, 8);
    else for (int i = 0; i < (int)left; i++) v |= (uint64_t)stream[byte + i] << 8 * i;
    return v;
}

#if defined(__AVX512BW__)
/* 32 E4M3 codes by their bits, several times faster than a gather from their table; to the last bit the same. The bits of
 * one, moved, are those of a float16 256 times smaller, subnormals too. */
INLINE void e4m3(const uint8_t *at, float scale, lanes *w) {
    __m512i v = _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)at)), 8);
    v = _mm512_and_si512(_mm512_srai_epi16(v, 1), _mm512_set1_epi16((short)0xbfff));
    __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(v, _mm512_set1_epi16(0x3f80)), _mm512_set1_epi16(0x3f80));
    v = _mm512_mask_mov_epi16(v, nan, _mm512_set1_epi16(0x7e00));
    w[0] = (lanes)_mm512_cvtph_ps(_mm512_castsi512_si256(v)) * (256 * scale);
    w[1] = (lanes)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1)) * (256 * scale);
}
#endif

struct problem {
    const uint8_t *codes, *zeros;
    const void *scales;
    const float *x, *table;
    float *y;
    int64_t row_bytes, zero_bytes, n, k, group, groups, scale_step, scale_count, width, stride;
    int exponents, bits;
};

static inline uint64_t eight(const uint8_t *at) {
    uint64_t v;
    memcpy(&v, at, 8);
    return v;
}

/* 32 weights from the bytes at `at`: entry * scale of the table, or code * scale - shift. */
INLINE void decode(const uint8_t *at, const int known, const int bits, const int entries, const float *table, lanes scaled,
                   float scale, float shift, lanes *w) {
#if defined(__AVX512BW__)
    if (known == 4) { /* the table is already scaled; of an index only four bits are looked at */
        __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
        w[0] = (lanes)_mm512_permutexvar_ps(code, (__m512)scaled);
        w[1] = (lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(code, 4), (__m512)scaled);
        return;
    }
    if (entries) {
        e4m3(at, scale, w);
        return;
    }
    for (int h = 0; h < 2; h++) {
        __m128i eights = known == 8 ? _mm_loadu_si128((const __m128i *)(at + 16 * h))
                                   : _mm_set_epi64x((int64_t)spread(eight(at + (2 * h + 1) * bits), bits),
                                                    (int64_t)spread(eight(at + 2 * h * bits), bits));
        __m512i code = _mm512_cvtepu8_epi32(eights);
        w[h] = (lanes)_mm512_cvtepi32_ps(code) * scale - shift;
    }
#elif defined(__AVX2__)
    for (int h = 0; h < 4; h++) {
        __m256i code;
        if (known == 4) {
            code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(at + h / 2 * 8)));
            if (!entries) { /* of an odd column 16 times its code, which its scale makes good */
                code = _mm256_and_si256(code, _mm256_set1_epi32(h & 1 ? 240 : 15));
                w[h] = (lanes)_mm256_cvtepi32_ps(code) * (h & 1 ? scale * 0.0625f : scale) - shift;
                continue;
            }
            if (h & 1) code = _mm256_srli_epi32(code, 4);
            /* Of an index only three bits are looked at; bit 3 says which half of the table. */
            w[h] = scale * (lanes)_mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), code),
                                                   _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), code),
                                                   _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
            continue;
        }
        code = _mm256_cvtepu8_epi32(known == 8 ? _mm_loadl_epi64((const __m128i *)(at + 8 * h))
                                              : _mm_cvtsi64_si128((int64_t)spread(eight(at + h * bits), bits)));
        w[h] = entries ? (lanes)_mm256_i32gather_ps(table, code, 4) * scale : (lanes)_mm256_cvtepi32_ps(code) * scale - shift;
    }
#else
    for (int h = 0; h < 4; h++) {
        uint64_t codes = known == 8 ? eight(at + 8 * h) : spread(eight(at + h * bits), bits);
        for (int l = 0; l < 8; l++) {
            int code = codes >> 8 * l & 255;
            w[(8 * h + l) / LANES][l % LANES] = entries ? table[code] * scale : (float)code * scale - shift;
        }
    }
#endif
}

/* Scales, and zero points times scales, of 16 groups of row r, some of them beyond the last: float16 scales, or powers of
 * two as their exponents (E8M0). */
static __attribute__((noinline)) void scales_of(const struct problem *p, int64_t r, int64_t first, int bits, float *scale,
                                                float *shift) {
    int64_t at = r * p->scale_step + first, left = p->scale_count - at;
    if (p->exponents) {
        for (int i = 0; i < BLOCK; i++) {
            uint32_t e = i < left ? ((const uint8_t *)p->scales)[at + i] : 0, b = e ? e << 23 : 1u << 22; /* 2^-127 is no normal float */
            memcpy(scale + i, &b, 4);
        }
    } else {
        const uint16_t *from = (const uint16_t *)p->scales + at;
        uint16_t end[BLOCK] = {0};
        if (left < BLOCK) {
            for (int i = 0; i < left; i++) end[i] = from[i];
            from = end;
        }
#if defined(__F16C__)
        for (int i = 0; i < BLOCK; i += 8)
            _mm256_storeu_ps(scale + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#else
        for (int i = 0; i < BLOCK; i++) scale[i] = half(from[i]);
#endif
    }
    if (p->table) return;
    for (int i = 0; i < BLOCK; i += 8) {
        int64_t bit = (r * p->groups + first + i) * bits;
        uint64_t zeros = p->zeros ? spread(bytes_at(p->zeros, p->zero_bytes, bit >> 3) >> (bit & 7), bits)
                                  : 0x0101010101010101ull << (bits - 1);
#if defined(__AVX2__)
        __m256 zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)zeros)));
        _mm256_storeu_ps(shift + i, _mm256_mul_ps(_mm256_loadu_ps(scale + i), zero));
#else
        for (int l = 0; l < 8; l++) shift[i + l] = scale[i + l] * (float)(int)(zeros >> 8 * l & 255);
#endif
    }
}

/* The last bytes of a row with zeros beyond. */
static __attribute__((noinline)) const uint8_t *end_of(const uint8_t *at, int64_t left, uint8_t *room) {
    memset(room, 0, CHUNK + 8);
    return memcpy(room, at, (size_t)left);
}

/* `count` rows of W from r on against m rows of x; all but p and r are constants wherever this is inlined;
 * known: the bits of a code if 4 or 8, otherwise 0. */
INLINE void some_rows(const struct problem *p, int64_t r, const int count, const int m, const int known, const int entries) {
    const int bits = known ? known : p->bits;
    const int sums = m * count < 5 ? PIECES : 1; /* so that a sum need not wait for the one before */
    float scale[4][BLOCK], shift[4][BLOCK];
    lanes total[16 * PIECES] = {{0}}, plain = {0}, out[16];
    int64_t row[4];
    const uint8_t *codes[4];
    for (int j = 0; j < count; j++) {
        row[j] = r + j < p->n ? r + j : p->n - 1; /* the last once more: cheaper than code for fewer */
        codes[j] = p->codes + row[j] * p->row_bytes;
    }
    if (LANES == 16 && known == 4)
        for (int l = 0; l < LANES; l++) plain[l] = entries ? p->table[l] : (float)l;
    /* Rows are too short for the processor to foresee the next ones, which lie behind these in memory. */
    const uint8_t *ahead = p->codes + (r + count) * p->row_bytes;
    for (int64_t g = 0; g < p->groups; g++) {
        int b = (int)(g % BLOCK);
        if (b == 0)
            for (int j = 0; j < count; j++) scales_of(p, row[j], g, bits, scale[j], shift[j]);
        lanes scaled[4] = {{0}};
        if (LANES == 16 && known == 4)
            UNROLL for (int j = 0; j < count; j++) scaled[j] = entries ? plain * scale[j][b] : plain * scale[j][b] - shift[j][b];
        int64_t stop = p->k - g * p->group < p->group ? p->k - g * p->group : p->group;
        for (int64_t c = 0; c < stop; c += CHUNK) {
            int64_t byte = (g * p->group + c) / 8 * bits, left = p->row_bytes - byte;
            const float *x = p->x + g * p->width + c;
            for (int line = 0; line < count * 4 * (known ? known : 6); line += 64) __builtin_prefetch(ahead + line);
            ahead += count * 4 * bits;
            UNROLL for (int j = 0; j < count; j++) {
                const uint8_t *at = codes[j] + byte;
                uint8_t room[CHUNK + 8];
                if (__builtin_expect(left < (known == 4 || known == 8 ? 4 * bits : 3 * bits + 8), 0)) at = end_of(at, left, room);
                lanes w[PIECES];
                decode(at, known, bits, entries, p->table, scaled[j], scale[j][b], shift[j][b], w);
                UNROLL for (int i = 0; i < m; i++)
                    UNROLL for (int h = 0; h < PIECES; h++)
                        total[(j * m + i) * sums + h % sums] += *(const lanes *)(x + i * p->stride + h * LANES) * w[h];
            }
        }
    }
    UNROLL for (int j = 0; j < count; j++)
        UNROLL for (int i = 0; i < m; i++) {
            out[j * m + i] = total[(j * m + i) * sums];
            UNROLL for (int h = 1; h < sums; h++) out[j * m + i] += total[(j * m + i) * sums + h];
        }
    for (int j = 0; j < count; j++)
        for (int i = 0; i < m; i++) {
            const float *of = (const float *)(out + j * m + i);
            float sum = 0;
            for (int l = 0; l < LANES; l++) sum += of[l];
            p->y[i * p->n + row[j]] = sum;
        }
}

/* x by groups, each with zeros up to whole chunks, in the order in which the codes are decoded. */
static void arrange(const float *x, float *to, int64_t m, int64_t k, const struct problem *p, int split) {
    memset(to, 0, (size_t)(m * p->stride) * sizeof *to);
    for (int64_t i = 0; i < m; i++)
        for (int64_t g = 0; g < p->groups; g++) {
            const float *from = x + i * k + g * p->group;
            float *at = to + i * p->stride + g * p->width;
            int64_t size = k - g * p->group < p->group ? k - g * p->group : p->group;
            if (!split) memcpy(at, from, (size_t)size * sizeof *at);
            else
                for (int64_t c = 0; c < size; c++)
                    at[c / (2 * LANES) * 2 * LANES + c % 2 * LANES + c % (2 * LANES) / 2] = from[c];
        }
}

/* As many rows of W at a time as registers hold the sums of. */
#define TOGETHER(M) (LANES < 16 ? (M < 3 ? 2 : 1) : M < 3 ? 4 : 2)
#define ROWS(M, E, B)                                                                       \
    case M: {                                                                               \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                   \
        for (int64_t r = 0; r < n; r += TOGETHER(M)) some_rows(&p, r, TOGETHER(M), M, B, E);\
        break;                                                                              \
    }
#define ALL_ROWS(E, B)                                              \
    switch (m) {                                                    \
        ROWS(1, E, B) ROWS(2, E, B) ROWS(3, E, B) ROWS(4, E, B)     \
        ROWS(5, E, B) ROWS(6, E, B) ROWS(7, E, B) ROWS(8, E, B)     \
    }                                                               \
    break;

/* m is 1 to 8; group is a multiple of 8 or k. work has room for m rows of x, each group filled up to a multiple of 32. */
void bitatlas_linear(const uint8_t *codes, int64_t row_bytes, const uint16_t *scales, const uint8_t *zeros,
                     int64_t zero_bytes, const float *x, float *work, float *y, int64_t m, int64_t n, int64_t k,
                     int64_t group, int bits, int threads) {
    int64_t groups = (k + group - 1) / group, width = (group + CHUNK - 1) / CHUNK * CHUNK;
    struct problem p = {codes, zeros, scales, work, 0, y, row_bytes, zero_bytes, n, k, group, groups, groups, n * groups,
                        width, groups * width, 0, bits};
    arrange(x, work, m, k, &p, SPLIT && bits == 4);
    switch (bits) {
    case 4: ALL_ROWS(0, 4)
    case 8: ALL_ROWS(0, 8)
    default: ALL_ROWS(0, 0)
    }
}

/* The same with a table of 1 << bits entries, bits 4 or 8; that of 256 is E4M3's. scale_step: scales from row to row, 0 for
 * one of the whole matrix; exponents: they are E8M0 bytes. */
void bitatlas_table_linear(const uint8_t *codes, int64_t row_bytes, const void *scales, int64_t scale_step, int exponents,
                           const float *table, const float *x, float *work, float *y, int64_t m, int64_t n, int64_t k,
                           int64_t group, int bits, int threads) {
    int64_t groups = (k + group - 1) / group, width = (group + CHUNK - 1) / CHUNK * CHUNK;
    struct problem p = {codes, 0, scales, work, table, y, row_bytes, 0, n, k, group, groups, scale_step,
                        scale_step ? n * groups : 1, width, groups * width, exponents, bits};
    arrange(x, work, m, k, &p, SPLIT && bits == 4);
    switch (bits) {
    case 4: ALL_ROWS(16, 4)
    default: ALL_ROWS(256, 8)
    }
}
