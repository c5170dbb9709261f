/* What the parts of the kernel of many small tensors share: the layout of its state, and the bits of doubles.
 *
 * The parts are headers of one source, `_batch.c`: compiled together, facts about a tensor stay in registers. Compiled
 * apart, tensors of 16 float32 took a tenth longer.
 */

#ifndef TORCHPARAMS_BATCH_H
#define TORCHPARAMS_BATCH_H

#include "_common.h"

#ifndef __SIZEOF_INT128__
#error "exact sums need integers of 128 bits: other compilers use the NumPy definition"
#endif
#if !IEEE
#error "quantiles need IEEE doubles without excess precision: other machines use the NumPy definition"
#endif

typedef unsigned __int128 u128;

enum kind { P8, P16, F32, F64, I32, U32, I64, U64, KINDS };
enum order { ASCENDING, SIGNED, FLOATING };

enum {
    MOST = 1 << 16, /* maximum values of a tensor: so many squares of 106 bits fit in 128 */
    CODES = 1 << 19,
    BINS = 12,
    REALS = 7,            /* mean, std, l1, l2, entropy, low, high; then the quantiles */
    INTEGERS = 6 + BINS,  /* zeros, nan, posinf, neginf, distinct, saturated; then the histogram */
    EXTREMES = 3,         /* min, max, linf: the bits of a double, or an integer where the kind is one */
};

/* How values are counted. */
typedef struct {
    int kind, order, boolean, exact;
    double largest; /* the largest finite value, if values there count as saturated; otherwise NaN */
} form;

typedef struct {
    u128 sum[2], square; /* of mantissas: of positive, of negative values */
} bin;

/* Facts about a tensor before its codes are read; none for an exact kind. */
typedef struct {
    uint64_t zeros, posinf, neginf, finite;
    double min, max; /* of finite values; a zero is +0.0 */
    uint64_t low, high, reach; /* of integers, in two's complement: minimum, maximum, greatest magnitude */
    size_t first, last; /* of floats: words of `used` from the first to the one after the last magnitude; also word 0 */
} seen;

typedef struct {
    uint32_t counts[CODES];     /* zeros between two tensors, as all below up to the codes */
    uint64_t used[CODES / 64];  /* a bit for each code that occurs */
    uint64_t near[512][2]; /* of float32: sum and squares of mantissas, by sign and exponent */
    bin bins[2048];             /* by exponent as in float64 */
    uint64_t bins_used[32];
    u128 magnitudes[2], squares[2]; /* of integers: by sign; squares by low and high half */
    uint32_t upto[MOST], times[MOST + 1];
    double values[MOST];
} state;

static double from_bits(uint64_t bits)
{
    double d;
    memcpy(&d, &bits, 8);
    return d;
}

static uint64_t to_bits(double d)
{
    uint64_t bits;
    memcpy(&bits, &d, 8);
    return bits;
}

/* Adds the same double `n` times to the sums. */
INLINE void add_double(state *t, uint64_t bits, uint64_t n)
{
    unsigned e = bits >> 52 & 2047;
    uint64_t m = (bits & 0xfffffffffffff) | (e ? 0x10000000000000 : 0);
    bin *b = &t->bins[e];
    b->sum[bits >> 63] += (u128)m * n;
    b->square += (u128)m * m * n;
    t->bins_used[e >> 6] |= (uint64_t)1 << (e & 63);
}

INLINE double value_of_f32(uint32_t bits)
{
    /* through integers: a process may be set to take subnormal numbers for zero */
    uint32_t e = bits >> 23 & 255, m = bits & 0x7fffff;
    double v = e ? from_bits((uint64_t)(e + 896) << 52 | (uint64_t)m << 29) : (double)m * 0x1p-149;
    return bits >> 31 ? -v : v;
}

#endif
