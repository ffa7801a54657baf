/* Squared singular values of many medium matrices, one thread: Gram product, tridiagonal form, Sturm counts; and the
 * vectors of the smallest.
 *
 * Single precision unless DOUBLE is defined; out of the level-2 cache: the lower triangle of a single precision
 * Gram matrix of 768 rows is 1.2 MB.
 * Layout of a Gram matrix: `ld` floats a row, rows and columns filled with zeros up to a multiple of 32; the lower
 * triangle is valid, and so are whole 32 x 32 blocks on the diagonal, so that every loop runs over whole vectors.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
typedef int64_t whole;
#define TINY 1e-100
#define NORMAL DBL_MIN
#define STEPS 30 /* halvings of a bracket */
#define SPAN 44 /* powers of two below the largest eigenvalue where brackets are narrow from the start */
#else
typedef float real;
typedef int32_t whole;
#define TINY 1e-9f
#define NORMAL FLT_MIN
#define STEPS 19
#define SPAN 22
#endif
#ifdef __AVX512F__
#define MR 8
#define LANES 16
#else
#define MR 4
#define LANES 8
#endif
#ifdef DOUBLE
#define VL (LANES / 2)
#else
#define VL LANES
#endif
#define PANEL 32 /* columns of a packed panel; diagonal blocks are as wide */
#define NV (PANEL / VL)
#define KC 256 /* rows of the matrix that are packed at a time */
#if !defined(DOUBLE) && defined(__AVX512BF16__)
#define PAIRS /* weights that are bfloat16 are multiplied as such, exactly, two at a time */
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef real vec __attribute__((vector_size(VL * sizeof(real))));
typedef real uvec __attribute__((vector_size(VL * sizeof(real)), aligned(sizeof(real))));
typedef whole ivec __attribute__((vector_size(VL * sizeof(real))));

static inline vec load(const real *p) { return *(const uvec *)p; }
static inline void store(real *p, vec v) { *(uvec *)p = v; }
static inline vec all(real x) { return x - (vec){0}; }

/* Sum of each of four vectors: halves of two side by side, quarters of four, then what is left inside a quarter. */
static inline void totals(const vec d[4], real *out) {
#define PICK(a, b, f) __builtin_shuffle(a, b, (ivec)f)
#if VL == 16
    const ivec half = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const ivec quarter = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const ivec two = {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};
    const ivec one = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
#elif VL == 8
    const ivec half = {0, 1, 2, 3, 8, 9, 10, 11}, quarter = {0, 1, 4, 5, 8, 9, 12, 13};
    const ivec one = {1, 0, 3, 2, 5, 4, 7, 6};
#else
    const ivec half = {0, 1, 4, 5}, quarter = {0, 2, 4, 6};
#endif
    vec ab = PICK(d[0], d[1], half) + PICK(d[0], d[1], (half + VL / 2));
    vec cd = PICK(d[2], d[3], half) + PICK(d[2], d[3], (half + VL / 2));
    vec s = PICK(ab, cd, quarter) + PICK(ab, cd, (quarter + VL / 4));
#if VL == 16
    s += __builtin_shuffle(s, two);
#endif
#if VL >= 8
    s += __builtin_shuffle(s, one);
#endif
    for (int r = 0; r < 4; r++) out[r] += s[r * (VL / 4)];
}

/* a . b; both are zero from n up to the next multiple of PANEL, or n is one. */
static real product(const real *a, const real *b, int64_t n) {
    vec s[4] = {{0}};
    for (int64_t j = 0; j < n; j += PANEL)
        for (int i = 0; i < PANEL / VL; i++) s[i % 4] += load(a + j + i * VL) * load(b + j + i * VL);
    real out[4] = {0};
    totals(s, out);
    return out[0] + out[1] + out[2] + out[3];
}

/* Rows k0.. of w, kc of them, as panels of PANEL columns: pack[panel][k][column]. */
static void pack_rows(const real *w, int64_t row, int64_t col, int64_t kc, int64_t n, real *pack) {
    for (int64_t p = 0; p < n; p += PANEL) {
        real *out = pack + p * kc;
        int64_t width = n - p < PANEL ? n - p : PANEL;
        if (width < PANEL) memset(out, 0, sizeof(real) * kc * PANEL);
        if (col == 1)
            for (int64_t k = 0; k < kc; k++) memcpy(out + k * PANEL, w + k * row + p, sizeof(real) * width);
        else
            for (int64_t k0 = 0; k0 < kc; k0 += 16)
                for (int64_t j = 0; j < width; j++)
                    for (int64_t k = k0; k < kc && k < k0 + 16; k++) out[k * PANEL + j] = w[k * row + (p + j) * col];
    }
}

/* g[MR][PANEL] += sum over k of a[k][0..MR) b[k][0..PANEL) */
static void tile(const real *a, const real *b, int64_t kc, real *g, int64_t ld) {
    vec acc[MR][NV] = {{{0}}};
    for (int64_t k = 0; k < kc; k++) {
        vec bv[NV];
        for (int j = 0; j < NV; j++) bv[j] = load(b + k * PANEL + j * VL);
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NV; j++) acc[i][j] += all(a[k * PANEL + i]) * bv[j];
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) {
            real *at = g + i * ld + j * VL;
            store(at, load(at) + acc[i][j]);
        }
}

#ifdef PAIRS
/* As pack_rows, two rows' bfloat16 in a word: pack[panel][k / 2][column]; 0 when a weight is no bfloat16. */
static int pack_pairs(const real *w, int64_t row, int64_t col, int64_t kc, int64_t n, uint32_t *pack) {
    const uint32_t *bits = (const uint32_t *)w;
    const int64_t half = (kc + 1) / 2;
    uint32_t lost = 0;
    for (int64_t p = 0; p < n; p += PANEL) {
        uint32_t *out = pack + p * half;
        int64_t width = n - p < PANEL ? n - p : PANEL, even = kc / 2;
        if (width < PANEL) memset(out, 0, 4 * PANEL * half);
        if (row == 1)
            for (int64_t k = 0; k < even; k += 16) { /* along the columns first: a word at a time misses the cache */
                uint32_t turned[PANEL][16];
                int64_t here = even - k < 16 ? even - k : 16;
                for (int64_t j = 0; j < width; j++) {
                    const uint32_t *x = bits + 2 * k + (p + j) * col;
                    for (int64_t i = 0; i < here; i++) {
                        lost |= x[2 * i] | x[2 * i + 1];
                        turned[j][i] = x[2 * i] >> 16 | (x[2 * i + 1] & 0xffff0000u);
                    }
                }
                for (int64_t i = 0; i < here; i++)
                    for (int64_t j = 0; j < width; j++) out[(k + i) * PANEL + j] = turned[j][i];
            }
        else
            for (int64_t k = 0; k < even; k++) {
                const uint32_t *x = bits + 2 * k * row + p * col;
                for (int64_t j = 0; j < width; j++) {
                    lost |= x[j * col] | x[j * col + row];
                    out[k * PANEL + j] = x[j * col] >> 16 | (x[j * col + row] & 0xffff0000u);
                }
            }
        for (int64_t j = 0; j < width && even < half; j++) {
            uint32_t last = bits[(kc - 1) * row + (p + j) * col];
            lost |= last;
            out[even * PANEL + j] = last >> 16;
        }
        if (lost & 0xffff) return 0;
    }
    return 1;
}

static inline void tile_pairs(const uint32_t *a, const uint32_t *b, int64_t pairs, real *g, int64_t ld) {
    __m512 acc[MR][NV] = {{{0}}};
    for (int64_t k = 0; k < pairs; k++)
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NV; j++)
                acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)_mm512_set1_epi32((int)a[k * PANEL + i]),
                                             (__m512bh)_mm512_loadu_si512(b + k * PANEL + j * VL));
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) store(g + i * ld + j * VL, load(g + i * ld + j * VL) + (vec)acc[i][j]);
}
#endif

/* g += w^T w for `rows` rows of w, element (k, j) at w[k * row + j * col]; pack holds KC * padded n reals. */
void bitatlas_gram(const real *w, int64_t row, int64_t col, int64_t rows, int64_t n, real *g, int64_t ld, real *pack) {
    int pairs = 1;
    for (int64_t k = 0; k < rows; k += KC) {
        int64_t kc = rows - k < KC ? rows - k : KC;
#ifdef PAIRS
        pairs = pairs && pack_pairs(w + k * row, row, col, kc, n, (uint32_t *)pack);
#else
        pairs = 0;
#endif
        if (!pairs) pack_rows(w + k * row, row, col, kc, n, pack);
        for (int64_t j = 0; j < n; j += PANEL)
            for (int64_t i = j; i < n; i += PANEL)
                for (int64_t r = 0; r < PANEL; r += MR) {
                    real *at = g + (i + r) * ld + j;
#ifdef PAIRS
                    int64_t half = (kc + 1) / 2;
                    const uint32_t *words = (const uint32_t *)pack;
                    if (pairs) tile_pairs(words + i * half + r, words + j * half, half, at, ld);
                    else
#endif
                        tile(pack + i * kc + r, pack + j * kc, kc, at, ld);
                }
    }
}

/* Four rows of the leading block, `blocks` panels of them left of the diagonal panel: g -= v w^T + w v^T, and y = g u. */
static void four_rows(real *g, int64_t ld, int64_t i, const real *v, const real *w, const real *u, real *y) {
    int64_t left = i / PANEL * PANEL;
    real *row[4];
    vec vi[4], wi[4], ui[4], dot[4];
    for (int r = 0; r < 4; r++) {
        row[r] = g + (i + r) * ld;
        vi[r] = all(v[i + r]), wi[r] = all(w[i + r]), ui[r] = all(u[i + r]), dot[r] = all(0);
    }
    for (int64_t j = 0; j < left; j += VL) {
        vec vj = load(v + j), wj = load(w + j), uj = load(u + j), yj = load(y + j);
        for (int r = 0; r < 4; r++) {
            vec a = load(row[r] + j) - vi[r] * wj - wi[r] * vj;
            store(row[r] + j, a);
            dot[r] += a * uj;
            yj += a * ui[r];
        }
        store(y + j, yj);
    }
    for (int64_t j = left; j < left + PANEL; j += VL) { /* whole in memory: its other triangle is no one's mirror */
        vec vj = load(v + j), wj = load(w + j), uj = load(u + j);
        for (int r = 0; r < 4; r++) {
            vec a = load(row[r] + j) - vi[r] * wj - wi[r] * vj;
            store(row[r] + j, a);
            dot[r] += a * uj;
        }
    }
    totals(dot, y + i);
}

/* Householder reduction of a Gram matrix to diagonal d (n) and subdiagonal e (n - 1).
 * Rows from the last to the first, each update of the block fused with the next product; work: 4 * ld reals.
 * The reflectors I - tau u u^T stay behind: tau[k], and u in the first k of row k. */
static void tridiagonal(real *g, int64_t n, int64_t ld, real *d, real *e, real *tau, real *work) {
    real *v = work, *w = v + ld, *u = w + ld, *y = u + ld;
    memset(work, 0, sizeof(real) * 4 * ld);
    for (int64_t k = n - 1; k > 0; k--) {
        real *x = g + k * ld;
        int64_t padded = (k + PANEL - 1) / PANEL * PANEL; /* rows and columns of whole panels that hold 0 .. k - 1 */
        real vk = v[k], wk = w[k], last = x[k] - 2 * vk * wk;
        d[k] = last;
        for (int64_t j = 0; j < k; j++) u[j] = x[j] - vk * w[j] - wk * v[j];
        memset(u + k, 0, sizeof(real) * (ld - k));
        memset(y, 0, sizeof(real) * padded);
        double alpha = u[k - 1];
        u[k - 1] = 0;
        double sigma = product(u, u, padded), norm = sqrt(alpha * alpha + sigma);
        double beta = sigma > 0 ? (alpha > 0 ? -norm : norm) : alpha, strength = sigma > 0 ? (beta - alpha) / beta : 0;
        real scale = (real)(sigma > 0 ? 1 / (alpha - beta) : 0), t = (real)strength;
        e[k - 1] = (real)beta;
        tau[k] = t;
        for (int64_t j = 0; j < padded; j++) u[j] *= scale;
        u[k - 1] = 1;
        v[k] = w[k] = 0; /* the row that leaves takes no part any more */
        memcpy(x, u, sizeof(real) * k);
        for (int64_t i = 0; i < padded; i += 4) four_rows(g, ld, i, v, w, u, y);
        real half = (real)(0.5 * strength * strength * product(y, u, padded));
        for (int64_t j = 0; j < padded; j++) w[j] = t * y[j] - half * u[j];
        memset(w + k, 0, sizeof(real) * (ld - k));
        real *old = v;
        v = u, u = old;
    }
    d[0] = g[0] - 2 * v[0] * w[0];
}

#define WIDE (4 * VL) /* shifts at a time: four chains hide the latency */

static inline vec pick(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }

/* How many eigenvalues lie below each of WIDE shifts: sign changes of the leading minors of T - x, kept near 1 by powers
 * of two. Quotients of minors need no scaling, but a division is three times as long. */
static void below(const real *d, const real *e2, int64_t n, const real *shift, whole *count) {
    const ivec sign = (ivec)all((real)-0.0), power = (ivec)all((real)INFINITY);
    const ivec largest = power - (ivec)all(NORMAL); /* a power of two's bits, less those of another, are their quotient's */
    vec q[4], p[4], x[4];
    ivec c[4];
    for (int a = 0; a < 4; a++) {
        x[a] = load(shift + a * VL), q[a] = all(1), p[a] = d[0] - x[a];
        c[a] = (ivec)p[a] < 0;
    }
    for (int64_t i = 1; i < n; i++) {
        vec di = all(d[i]), ei = all(e2[i - 1]);
        for (int a = 0; a < 4; a++) {
            vec next = (di - x[a]) * p[a] - ei * q[a];
            c[a] += ((ivec)next ^ (ivec)p[a]) >> (8 * sizeof(real) - 1);
            q[a] = p[a], p[a] = next;
        }
        if (i % 4 == 0)
            for (int a = 0; a < 4; a++) {
                ivec sum = (ivec)((vec)((ivec)q[a] & ~sign) + (vec)((ivec)p[a] & ~sign));
                vec scale = (vec)(largest - (sum & power));
                q[a] *= scale, p[a] *= scale;
            }
    }
    for (int a = 0; a < 4; a++)
        for (int i = 0; i < VL; i++) count[a * VL + i] = -c[a][i];
}

#define GRID 64

/* An upper bound of the eigenvalues, at most 1 as all is scaled by a power of two; what undoes that. Subdiagonals are lifted
 * to what keeps four minors in a row in range. */
static real bound(const real *d, const real *e, int64_t n, real *ds, real *e2, real *top) {
    real most = 0;
    int power;
    for (int64_t i = 0; i < n; i++) {
        real r = d[i] + (i ? (real)fabs(e[i - 1]) : 0) + (i < n - 1 ? (real)fabs(e[i]) : 0);
        most = r > most ? r : most;
    }
    *top = (real)(frexp(most, &power) * 1.000001);
    real scale = (real)ldexp(1, -power);
    for (int64_t i = 0; i < n; i++) ds[i] = d[i] * scale;
    for (int64_t i = 0; i < n - 1; i++) {
        real next = e[i] * scale;
        e2[i] = next * next > TINY * TINY ? next * next : TINY * TINY;
    }
    return 1 / scale;
}

/* Eigenvalues of a tridiagonal matrix without negative ones, ascending, to 1e-6 of each; work: 2 * n reals. */
static void bisect(const real *d, const real *e, int64_t n, real *out, real *work) {
    real top, *ds = work, *e2 = work + n, scale = bound(d, e, n, ds, e2, &top);
    real grid[GRID], shift[WIDE], lo[WIDE], hi[WIDE];
    whole known[GRID], count[WIDE];
    if (!(top > 0)) {
        memset(out, 0, sizeof(real) * n);
        return;
    }
    for (int g = 0; g < GRID; g++) grid[g] = top * (real)exp2(-(double)SPAN * (GRID - 1 - g) / GRID);
    for (int g = 0; g < GRID; g += WIDE) below(ds, e2, n, grid + g, known + g);
    for (int64_t base = 0; base < n; base += WIDE) {
        for (int s = 0; s < WIDE; s++) {
            int64_t index = base + s < n ? base + s : n - 1;
            int cell = 0;
            while (cell < GRID - 1 && known[cell] <= index) cell++;
            hi[s] = grid[cell], lo[s] = cell ? grid[cell - 1] : 0;
        }
        for (int step = 0; step < STEPS; step++) {
            for (int s = 0; s < WIDE; s++) shift[s] = (lo[s] + hi[s]) / 2;
            below(ds, e2, n, shift, count);
            for (int s = 0; s < WIDE; s++) {
                int64_t index = base + s < n ? base + s : n - 1;
                if (count[s] > index) hi[s] = shift[s];
                else lo[s] = shift[s];
            }
        }
        for (int s = 0; s < WIDE && base + s < n; s++) out[base + s] = scale * ((lo[s] + hi[s]) / 2);
    }
}

/* All n eigenvalues of a Gram matrix, ascending; g and the first three of 7 * ld reals of work keep its reduction
 * (reflectors; diagonal, subdiagonal, tau). */
void bitatlas_eigenvalues(real *g, int64_t n, int64_t ld, real *out, real *work) {
    real *d = work, *e = d + ld, *tau = e + ld;
    tridiagonal(g, n, ld, d, e, tau, tau + ld);
    bisect(d, e, n, out, tau + ld);
}

/* Squared singular values of `count` square tiles of n: out (count, n), each ascending. */
void bitatlas_tiles(const real *tiles, int64_t count, int64_t n, real *out, real *g, int64_t ld, real *pack, real *work) {
    int64_t padded = (n + PANEL - 1) / PANEL * PANEL;
    for (int64_t t = 0; t < count; t++) {
        memset(g, 0, sizeof(real) * padded * ld);
        bitatlas_gram(tiles + t * n * n, n, 1, n, n, g, ld, pack);
        bitatlas_eigenvalues(g, n, ld, out + t * n, work);
    }
}

/* Unit vectors (n, count) of the `count` smallest eigenvalues, between low and high, of a tridiagonal matrix; work:
 * (2 * VL + 1) * n. The values are found to 1e-5 of that range only: what a vector has of its neighbours' does no harm
 * where the space that all of them span is wanted. */
void bitatlas_vectors(const real *d, const real *e, int64_t n, real low, real high, int64_t count, real *vectors, real *work) {
    real *e2 = work, *down = work + n, *up = down + VL * n, shift[WIDE], lo[WIDE], hi[WIDE];
    const real tiny = (high - low) * TINY;
    whole found[WIDE];
    for (int64_t i = 0; i < n - 1; i++) e2[i] = e[i] * e[i] > tiny * tiny ? e[i] * e[i] : tiny * tiny;
    for (int64_t first = 0; first < count; first += WIDE) {
        for (int s = 0; s < WIDE; s++) lo[s] = low, hi[s] = high;
        for (int step = 0; step < 17; step++) {
            for (int s = 0; s < WIDE; s++) shift[s] = (lo[s] + hi[s]) / 2;
            below(d, e2, n, shift, found);
            for (int s = 0; s < WIDE; s++) {
                if (found[s] > first + s) hi[s] = shift[s];
                else lo[s] = shift[s];
            }
        }
        for (int c = 0; c < WIDE && first + c < count; c += VL) { /* pivots from both ends; where they meet best, a 1 */
            vec x = (load(lo + c) + load(hi + c)) / 2, q = all(1), p = all(1), best, at = all(0), z = all(0), norm = all(0);
            for (int64_t i = 0, j = n - 1; i < n; i++, j--) {
                q = (d[i] - x) - (i ? e2[i - 1] / q : all(0)) + tiny;
                p = (d[j] - x) - (i ? e2[j] / p : all(0)) + tiny;
                store(down + i * VL, q), store(up + j * VL, p);
            }
            for (int64_t i = 0; i < n; i++) {
                vec sum = load(down + i * VL) + load(up + i * VL) - (d[i] - x);
                sum = pick(sum < 0, -sum, sum);
                ivec less = i ? sum < best : sum == sum;
                best = i ? pick(less, sum, best) : sum;
                at = pick(less, all((real)i), at);
            }
            for (int64_t i = n - 1; i >= 0; i--) {
                z = pick(at == (real)i, all(1), i < n - 1 ? -(e[i] / load(down + i * VL)) * z : z);
                store(down + i * VL, z);
                norm += z * z;
            }
            z = all(0);
            for (int64_t i = 0; i < n; i++) {
                ivec here = at == (real)i;
                z = i ? -(e[i - 1] / load(up + i * VL)) * z : z;
                store(up + i * VL, load(down + i * VL) + z);
                norm += z * z;
                z = pick(here, all(1), z);
            }
            for (int l = 0; l < VL; l++) norm[l] = 1 / (real)sqrt(norm[l]);
            for (int64_t i = 0; i < n; i++) store(vectors + i * count + first + c, load(up + i * VL) * norm);
        }
    }
}

/* Vectors (n, count) of the reduced matrix turned into those of the matrix itself, of which tridiagonal() left
 * reflectors in g; count is a multiple of 16. */
void bitatlas_turn(const real *g, int64_t n, int64_t ld, const real *tau, real *vectors, int64_t count) {
    for (int64_t c = 0; c < count; c += VL)
        for (int64_t k = 1; k < n; k++) {
            const real *u = g + k * ld;
            vec s[4] = {{0}};
            int64_t j = 0;
            for (; j + 4 <= k; j += 4)
                for (int a = 0; a < 4; a++) s[a] += u[j + a] * load(vectors + (j + a) * count + c);
            for (; j < k; j++) s[0] += u[j] * load(vectors + j * count + c);
            vec by = tau[k] * (s[0] + s[1] + s[2] + s[3]);
            for (j = 0; j < k; j++) {
                real *at = vectors + j * count + c;
                store(at, load(at) - u[j] * by);
            }
        }
}
