/* The numbers of a small tensor, from its counts and sums. */

#ifndef TORCHPARAMS_BATCH_DERIVE_H
#define TORCHPARAMS_BATCH_DERIVE_H

#include "_batch_natural.h"

enum { NEAR = 28 }; /* exponents whose 2^16 squares of 48 bits fit in 128 bits together */

/* Sum, sum of magnitudes and of squares, in units of 2^*unit (squared); whether the sum is negative. Clears them. */
static int take_sums(state *t, int kind, natural *sum, natural *abs, natural *squares, int *unit)
{
    natural minus = {0, {0}};
    int first = -1, bias = kind == F32 ? 150 : 1075;
    u128 near[3] = {0, 0, 0}; /* of the lowest exponents: mostly all there are */
    sum->n = abs->n = squares->n = 0;
    *unit = 0;
    for (int w = 0; w < 32; w++)
        for (uint64_t left = t->bins_used[w]; left; left &= left - 1) {
            int e = 64 * w + __builtin_ctzll(left), exponent = e ? e : 1;
            bin *b = &t->bins[e];
            if (first < 0) {
                first = exponent;
                *unit = exponent - bias;
            }
            int shift = exponent - first;
            if (kind == F32 && shift <= NEAR) {
                near[0] += b->sum[0] << shift;
                near[1] += b->sum[1] << shift;
                near[2] += b->square << 2 * shift;
            } else {
                add_shifted(sum, b->sum[0], shift);
                add_shifted(&minus, b->sum[1], shift);
                add_shifted(squares, b->square, 2 * shift);
            }
            memset(b, 0, sizeof *b);
        }
    add_shifted(sum, near[0], 0);
    add_shifted(&minus, near[1], 0);
    add_shifted(squares, near[2], 0);
    memset(t->bins_used, 0, sizeof t->bins_used);
    if (kind >= I32) {
        add_shifted(sum, t->magnitudes[0], 0);
        add_shifted(&minus, t->magnitudes[1], 0);
        add_shifted(squares, t->squares[0], 0);
        add_shifted(squares, t->squares[1], 64);
        memset(t->magnitudes, 0, sizeof t->magnitudes);
        memset(t->squares, 0, sizeof t->squares);
    }
    add(abs, sum);
    add(abs, &minus);
    if (compare(sum, &minus) >= 0) {
        subtract(sum, &minus);
        return 0;
    }
    subtract(&minus, sum);
    *sum = minus;
    return 1;
}

static double middle_of_f64(uint32_t code)
{
    uint32_t top = code & 0x3ffff;
    if (top >= 0x3ff80)
        return top > 0x3ff80 ? NAN : code > 0x3ffff ? -INFINITY : INFINITY;
    return from_bits((uint64_t)code << 45 | (top ? (uint64_t)1 << 44 : 0));
}

static double middle_of_f32(uint32_t code)
{
    uint32_t top = code & 0x7fff;
    if (top >= 0x7f80)
        return top > 0x7f80 ? NAN : code > 0x7fff ? -INFINITY : INFINITY;
    return value_of_f32(code << 16 | (top ? 0x8000 : 0));
}

/* Index of the first of `n` ascending values not below `edge`; branchless, because a branch would be mispredicted. */
static size_t first_from(const double *values, size_t n, double edge)
{
    size_t low = 0;
    while (n) {
        size_t half = (n + 1) / 2;
        low += values[low + half - 1] < edge ? half : 0;
        n -= half;
    }
    return low;
}

/* Index of the value at a rank, from 0, in ascending order. */
static size_t place_of(const state *t, size_t n, uint64_t rank)
{
    size_t low = 0;
    while (n) {
        size_t half = (n + 1) / 2;
        low += t->upto[low + half - 1] <= rank ? half : 0;
        n -= half;
    }
    return low;
}

/* Results for the codes read so far. */
typedef struct {
    size_t n; /* values, ascending, with how many there are up to each */
    uint64_t saturated, distinct, upto;
    uint32_t most; /* the greatest count of a code */
} looked;

/* Reads a code that occurs; codes come in ascending order of their values. */
INLINE void look_at(state *t, const form *f, seen *s, looked *l, uint32_t code, const double *table, const int kind)
{
    const int exact = kind == P8 || kind == P16;
    uint32_t count = t->counts[code];
    double value = kind == F32 ? middle_of_f32(code) : kind == F64 ? middle_of_f64(code) : table[code];
    t->counts[code] = 0;
    t->times[count]++;
    l->most = count > l->most ? count : l->most;
    if (!(value - value == 0)) {
        if (exact && value > 0)
            s->posinf += count;
        else if (exact && value < 0)
            s->neginf += count;
        return;
    }
    if (exact) {
        if (fabs(value) == f->largest)
            l->saturated += count;
        if (value == 0)
            s->zeros += count;
        else
            add_double(t, to_bits(value), count);
        s->finite += count;
        s->min = l->n ? s->min : value + 0.0;
        s->max = value + 0.0;
    } else {
        value = value > s->min ? value : s->min;
        value = value < s->max ? value : s->max;
    }
    value += 0.0; /* -0.0 is 0 */
    l->distinct += !l->n || value != t->values[l->n - 1];
    l->upto += count;
    t->values[l->n] = value;
    t->upto[l->n++] = (uint32_t)l->upto;
}

/* Reads the codes of one word, with ascending values. */
INLINE void look_up(state *t, const form *f, seen *s, looked *l, size_t w, const double *table, const int kind)
{
    for (uint64_t left = t->used[w]; left; left &= left - 1)
        look_at(t, f, s, l, (uint32_t)(64 * w) + (uint32_t)__builtin_ctzll(left), table, kind);
    t->used[w] = 0;
}

/* The same, with descending values. */
INLINE void look_down(state *t, const form *f, seen *s, looked *l, size_t w, const double *table, const int kind)
{
    for (uint64_t left = t->used[w]; left;) {
        uint32_t bit = 63 - (uint32_t)__builtin_clzll(left);
        left ^= (uint64_t)1 << bit;
        look_at(t, f, s, l, (uint32_t)(64 * w) + bit, table, kind);
    }
    t->used[w] = 0;
}

/* Reads all codes that occur, in the order of their values, and clears them. */
INLINE looked look(state *t, const form *f, seen *s, const double *table, const int kind)
{
    const size_t words = (kind == P8 ? 256 : kind == F64 ? CODES : 1 << 16) / 64, half = words / 2;
    looked l = {0, 0, 0, 0, 0};
    if (f->order == FLOATING) { /* a sign, and a magnitude */
        size_t first = kind == P8 ? 0 : s->first, last = kind == P8 ? half : s->last;
        for (size_t w = last; w-- > first;)
            look_down(t, f, s, &l, half + w, table, kind);
        if (first) {
            look_down(t, f, s, &l, half, table, kind);
            look_up(t, f, s, &l, 0, table, kind);
        }
        for (size_t w = first; w < last; w++)
            look_up(t, f, s, &l, w, table, kind);
        return l;
    }
    for (size_t w = f->order == ASCENDING ? words : half; w < words; w++)
        look_up(t, f, s, &l, w, table, kind);
    for (size_t w = 0; w < (f->order == ASCENDING ? words : half); w++)
        look_up(t, f, s, &l, w, table, kind);
    return l;
}

static double entropy(state *t, uint32_t most, uint64_t total)
{
    double sum = 0;
    for (uint32_t n = 1; n <= most; n++) {
        if (!t->times[n])
            continue;
        sum += (double)((uint64_t)t->times[n] * n) / (double)total * log2((double)total / n);
        t->times[n] = 0;
    }
    return sum;
}

static void histogram(const state *t, size_t n, const seen *s, double mean, double std, double *reals, int64_t *out)
{
    double reach = std > 0 ? 3 * std : 0.0, low = mean - reach, high = mean + reach;
    low = s->min > low ? s->min : low;
    high = s->max < high ? s->max : high;
    if (!(low < high))
        low = s->min, high = s->max;
    reals[0] = low, reals[1] = high;
    if (low == high)
        low -= 0.5, high += 0.5;
    double before = -INFINITY;
    uint64_t below = 0;
    for (int k = 1; k <= BINS; k++) {
        double share = (double)k / BINS, edge = low * (1 - share) + high * share;
        edge = edge > before ? edge : before;
        before = edge;
        edge = edge > low ? edge : low;
        edge = edge < high ? edge : high;
        size_t at = k == BINS ? n : first_from(t->values, n, edge);
        uint64_t upto = at ? t->upto[at - 1] : 0;
        out[k - 1] = (int64_t)(upto - below);
        below = upto;
    }
}

/* All numbers of a tensor of `total` counted values; clears the counters. */
static void derive(state *t, const form *f, seen s, size_t total, const double *table, const double *quantiles,
                   size_t wanted, double *reals, int64_t *integers, uint64_t *extremes)
{
    looked l;
    switch (f->kind) {
    case P8: l = look(t, f, &s, table, P8); break;
    case P16: l = look(t, f, &s, table, P16); break;
    case F32: l = look(t, f, &s, table, F32); break;
    case F64: l = look(t, f, &s, table, F64); break;
    default: l = look(t, f, &s, table, I32);
    }
    reals[4] = entropy(t, l.most, total);
    uint64_t nan = total - s.finite - s.posinf - s.neginf;
    natural sum, abs, squares, lost;
    int unit, negative = take_sums(t, f->kind, &sum, &abs, &squares, &unit);
    double mean = s.finite ? ratio(&sum, negative, s.finite, unit) : NAN, std = NAN;
    reals[2] = ratio(&abs, 0, 1, unit);
    reals[3] = root(&squares, 1, unit);
    if (s.finite > 1) {
        square(&lost, &sum);
        multiply(&squares, s.finite);
        subtract(&squares, &lost);
        std = root(&squares, s.finite * (s.finite - 1), unit);
    }
    reals[0] = mean, reals[1] = std, reals[5] = reals[6] = NAN;
    memset(integers, 0, INTEGERS * sizeof *integers);
    if (s.finite)
        histogram(t, l.n, &s, mean, std, reals + 5, integers + 6);
    for (size_t k = 0; k < wanted; k++) {
        double *out = &reals[REALS + k];
        *out = NAN;
        if (!s.finite)
            continue;
        uint64_t last = s.finite - 1;
        double place = quantiles[k] * (double)last;
        uint64_t rank = (uint64_t)place < last ? (uint64_t)place : last;
        size_t at = place_of(t, l.n, rank), next = at + (rank < last && t->upto[at] <= rank + 1);
        double low = rank == last ? s.max : rank == 0 ? s.min : t->values[at];
        double high = rank + 1 >= last ? s.max : t->values[next], part = place - (double)rank;
        *out = low == high || part == 0 ? low : low * (1 - part) + high * part;
    }
    integers[0] = (int64_t)s.zeros, integers[1] = (int64_t)nan, integers[2] = (int64_t)s.posinf;
    integers[3] = (int64_t)s.neginf, integers[5] = (int64_t)l.saturated;
    integers[4] = (int64_t)(l.distinct + (nan > 0) + (s.posinf > 0) + (s.neginf > 0));
    if (f->kind >= I32) {
        extremes[0] = s.low, extremes[1] = s.high, extremes[2] = s.reach;
        return;
    }
    double low = fabs(s.min), high = fabs(s.max);
    extremes[0] = to_bits(s.neginf ? -INFINITY : s.finite ? s.min : s.posinf ? INFINITY : NAN);
    extremes[1] = to_bits(s.posinf ? INFINITY : s.finite ? s.max : s.neginf ? -INFINITY : NAN);
    extremes[2] = to_bits(!s.finite ? 0.0 : low > high ? low : high);
}

#endif
