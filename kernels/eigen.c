/* Squared singular values of many medium matrices, one thread: Gram product, tridiagonal form, Sturm counts.
 *
 * Single precision unless DOUBLE is defined; out of the level-2 cache: the lower triangle of a single precision
 * Gram matrix of 768 rows is 1.2 MB.
 * Layout of a Gram matrix: `ld` floats a row, rows and columns filled with zeros up to a multiple of 32; the lower
 * triangle is valid, and so are whole 32 x 32 blocks on the diagonal, so that every loop runs over whole vectors.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
typedef int64_t whole;
#define TINY 1e-100
#define SPAN 44 /* powers of two below the largest eigenvalue where brackets are narrow from the start */
#else
typedef float real;
typedef int32_t whole;
#define TINY 1e-18f
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
#define STEPS 19 /* halvings of a bracket */
#define PANEL 32 /* columns of a packed panel; diagonal blocks are as wide */
#define NV (PANEL / VL)
#define KC 256 /* rows of the matrix that are packed at a time */

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

/* g += w^T w for `rows` rows of w, element (k, j) at w[k * row + j * col]; pack holds KC * padded n reals. */
void bitatlas_gram(const real *w, int64_t row, int64_t col, int64_t rows, int64_t n, real *g, int64_t ld, real *pack) {
    for (int64_t k = 0; k < rows; k += KC) {
        int64_t kc = rows - k < KC ? rows - k : KC;
        pack_rows(w + k * row, row, col, kc, n, pack);
        for (int64_t j = 0; j < n; j += PANEL)
            for (int64_t i = j; i < n; i += PANEL)
                for (int64_t r = 0; r < PANEL; r += MR)
                    tile(pack + i * kc + r, pack + j * kc, kc, g + (i + r) * ld + j, ld);
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

/* Householder reduction of a Gram matrix (destroyed) to diagonal d (n) and squared subdiagonal e2 (n - 1).
 * Rows from the last to the first, each update of the block fused with the next product; work: 4 * ld reals. */
static void tridiagonal(real *g, int64_t n, int64_t ld, real *d, real *e2, real *work) {
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
        e2[k - 1] = (real)(norm * norm);
        double beta = alpha > 0 ? -norm : norm, tau = sigma > 0 ? (beta - alpha) / beta : 0;
        real scale = (real)(tau != 0 ? 1 / (alpha - beta) : 0);
        for (int64_t j = 0; j < padded; j++) u[j] *= scale;
        u[k - 1] = 1;
        v[k] = w[k] = 0; /* the row that leaves takes no part any more */
        for (int64_t i = 0; i < padded; i += 4) four_rows(g, ld, i, v, w, u, y);
        real t = (real)tau, half = (real)(0.5 * tau * tau * product(y, u, padded));
        for (int64_t j = 0; j < padded; j++) w[j] = t * y[j] - half * u[j];
        memset(w + k, 0, sizeof(real) * (ld - k));
        real *old = v;
        v = u, u = old;
    }
    d[0] = g[0] - 2 * v[0] * w[0];
}

#define WIDE (4 * VL) /* shifts at a time: four chains hide the division's latency */

/* How many eigenvalues lie below each of WIDE shifts. */
static void below(const real *d, const real *e2, int64_t n, const real *shift, whole *count) {
    vec q[4], x[4];
    ivec c[4];
    for (int a = 0; a < 4; a++) {
        x[a] = load(shift + a * VL);
        q[a] = d[0] - x[a];
        c[a] = q[a] < 0;
    }
    for (int64_t i = 1; i < n; i++) {
        vec di = all(d[i]), ei = all(e2[i - 1]);
        for (int a = 0; a < 4; a++) {
            q[a] = (di - x[a]) - ei / q[a];
            c[a] += q[a] < 0;
        }
    }
    for (int a = 0; a < 4; a++)
        for (int i = 0; i < VL; i++) count[a * VL + i] = -c[a][i];
}

#define GRID 64

/* An upper bound of the eigenvalues; subdiagonals are lifted to what keeps 0 / 0 out of the recurrence. */
static real bound(const real *d, real *e2, int64_t n) {
    real top = 0;
    for (int64_t i = 0; i < n; i++) {
        real r = d[i] + (i ? (real)sqrt(e2[i - 1]) : 0) + (i < n - 1 ? (real)sqrt(e2[i]) : 0);
        top = r > top ? r : top;
    }
    real least = top * TINY;
    for (int64_t i = 0; i < n - 1; i++) e2[i] = e2[i] > least * least ? e2[i] : least * least;
    return top * (real)1.000001;
}

/* Eigenvalues first .. n - 1 of a tridiagonal matrix without negative ones, ascending, to 1e-6 of each. */
static void bisect(const real *d, real *e2, int64_t n, int64_t first, real *out) {
    real top = bound(d, e2, n), grid[GRID], shift[WIDE], lo[WIDE], hi[WIDE];
    whole known[GRID], count[WIDE];
    if (!(top > 0)) {
        for (int64_t i = first; i < n; i++) out[i - first] = 0;
        return;
    }
    for (int g = 0; g < GRID; g++) grid[g] = top * (real)exp2(-(double)SPAN * (GRID - 1 - g) / GRID);
    for (int g = 0; g < GRID; g += WIDE) below(d, e2, n, grid + g, known + g);
    for (int64_t base = first; base < n; base += WIDE) {
        for (int s = 0; s < WIDE; s++) {
            int64_t index = base + s < n ? base + s : n - 1;
            int cell = 0;
            while (cell < GRID - 1 && known[cell] <= index) cell++;
            hi[s] = grid[cell], lo[s] = cell ? grid[cell - 1] : 0;
        }
        for (int step = 0; step < STEPS; step++) {
            for (int s = 0; s < WIDE; s++) shift[s] = (lo[s] + hi[s]) / 2;
            below(d, e2, n, shift, count);
            for (int s = 0; s < WIDE; s++) {
                int64_t index = base + s < n ? base + s : n - 1;
                if (count[s] > index) hi[s] = shift[s];
                else lo[s] = shift[s];
            }
        }
        for (int s = 0; s < WIDE && base + s < n; s++) out[base + s - first] = (lo[s] + hi[s]) / 2;
    }
}

/* All n eigenvalues of a Gram matrix (destroyed), ascending; work: 6 * ld reals. */
void bitatlas_eigenvalues(real *g, int64_t n, int64_t ld, real *out, real *work) {
    real *d = work + 4 * ld, *e2 = d + ld;
    tridiagonal(g, n, ld, d, e2, work);
    bisect(d, e2, n, 0, out);
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
