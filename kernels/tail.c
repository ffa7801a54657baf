/* Which start of a power-law tail fits best: the smallest Kolmogorov-Smirnov distance over all of them, one thread.
 *
 * Distance of start i over the points j >= i: the largest |1 - exp((1 - alpha_i) (ln x_j - ln x_i)) - (j - i) / (n - i)|.
 * Most starts are ruled out by eight points of their tail, most others by the first points looked at.
 */
#include <math.h>
#include <stdint.h>

#define VL 8
typedef double vec __attribute__((vector_size(VL * sizeof(double))));
typedef double uvec __attribute__((vector_size(VL * sizeof(double)), aligned(sizeof(double))));
typedef int64_t ivec __attribute__((vector_size(VL * sizeof(double))));

static inline vec all(double x) { return x - (vec){0}; }
static inline vec pick(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }
static inline vec larger(vec a, vec b) { return pick(a > b, a, b); }

/* exp of numbers up to 0, to the last bits: a power of two times a polynomial on half an octave around 1. */
static inline vec exponential(vec x) {
    static const double c[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                               1. / 720, 1. / 120, 1. / 24, 1. / 6, 1. / 2, 1, 1};
    x = larger(x, all(-700));
    vec shifted = x * 1.4426950408889634 + 6755399441055744.0; /* 1.5 * 2^52: the sum's last bits are the nearest integer */
    vec whole = shifted - 6755399441055744.0;
    vec r = (x - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10; /* ln 2 in two parts */
    vec p = all(c[0]);
    for (int i = 1; i < 14; i++) p = p * r + c[i];
    return (vec)((ivec)p + ((ivec)shifted << 52));
}

static inline vec gaps(vec logs, vec rank, double from, double slope, double share) {
    vec gap = 1 - exponential(slope * (logs - from)) - rank * share;
    return larger(gap, -gap);
}

/* The distance of start i, or some number above `enough` that it exceeds. logs: n, ascending, and VL - 1 more to read. */
static double distance(const double *logs, int64_t n, int64_t i, double alpha, double enough) {
    const vec lane = {0, 1, 2, 3, 4, 5, 6, 7};
    int64_t m = n - i;
    double slope = 1 - alpha, share = 1 / (double)m, worst = 0;
    vec at, x, most = {0};
    if (m > 4 * VL) {
        for (int l = 0; l < VL; l++) {
            int64_t j = l * (m - 1) / (VL - 1);
            at[l] = (double)j, x[l] = logs[i + j];
        }
        most = gaps(x, at, logs[i], slope, share);
        for (int l = 0; l < VL; l++) worst = most[l] > worst ? most[l] : worst;
        if (worst > enough) return worst;
    }
    for (int64_t j = 0; j < m; j += VL) {
        vec rank = lane + (double)j, gap = gaps(*(const uvec *)(logs + i + j), rank, logs[i], slope, share);
        most = larger(most, pick(rank < (double)m, gap, all(0)));
        if (j % (8 * VL) == 7 * VL || j + VL >= m) {
            for (int l = 0; l < VL; l++) worst = most[l] > worst ? most[l] : worst;
            if (worst > enough) return worst;
        }
    }
    return worst;
}

/* The start of the smallest distance + penalty, the first among equals, or -1; its distance in out[0]. out[1] is 1 when no
 * other can be as good although the distance of start i is off by up to slack[i]. A start whose alpha is NaN is none. */
int64_t bitatlas_tail(const double *logs, int64_t n, const double *alpha, const double *penalty, const double *slack, double *out) {
    int64_t best = -1;
    double least = INFINITY;
    for (int64_t i = n - 2; i >= 0; i--) { /* short tails first: they cost little */
        if (isnan(alpha[i])) continue;
        double found = distance(logs, n, i, alpha[i], least - penalty[i]) + penalty[i];
        if (found <= least) least = found, best = i;
    }
    out[0] = best < 0 ? NAN : least - penalty[best];
    out[1] = 1;
    for (int64_t i = 0; i < n - 1 && best >= 0; i++) {
        if (i == best || isnan(alpha[i])) continue;
        double enough = least + slack[best] + slack[i] - penalty[i];
        if (!(distance(logs, n, i, alpha[i], enough) > enough)) {
            out[1] = 0;
            break;
        }
    }
    return best;
}
