/* Exact sums, and the range of finite values.
 *
 * A sum is a fixed-point number of many 32-bit limbs, each in an int64 with 31 bits to spare, in
 * units of the smallest subnormal (of its square, for squares).
 */

#ifndef TORCHPARAMS_KERNELS_SUMS_H
#define TORCHPARAMS_KERNELS_SUMS_H

#include "_kernels.h"

INLINE void add_unsigned(int64_t *limbs, int position, uint64_t value)
{
    int k = position >> 5, s = position & 31;
    uint64_t low = (value & 0xffffffff) << s, high = (value >> 32) << s;
    limbs[k] += (int64_t)(low & 0xffffffff);
    limbs[k + 1] += (int64_t)(low >> 32) + (int64_t)(high & 0xffffffff);
    limbs[k + 2] += (int64_t)(high >> 32);
}

INLINE void subtract_unsigned(int64_t *limbs, int position, uint64_t value)
{
    int k = position >> 5, s = position & 31;
    uint64_t low = (value & 0xffffffff) << s, high = (value >> 32) << s;
    limbs[k] -= (int64_t)(low & 0xffffffff);
    limbs[k + 1] -= (int64_t)(low >> 32) + (int64_t)(high & 0xffffffff);
    limbs[k + 2] -= (int64_t)(high >> 32);
}

INLINE void add_signed(int64_t *limbs, int position, int64_t value)
{
    if (value < 0)
        subtract_unsigned(limbs, position, 0 - (uint64_t)value);
    else
        add_unsigned(limbs, position, (uint64_t)value);
}

static void carry(int64_t *limbs, int n)
{
    for (int i = 0; i + 1 < n; i++) {
        uint64_t low = (uint64_t)limbs[i] & 0xffffffff;
        /* exact: the rest is a multiple of 2^32 */
        limbs[i + 1] += (limbs[i] - (int64_t)low) / 4294967296;
        limbs[i] = (int64_t)low;
    }
}

/* Out of line: loops call it rarely, and it would take registers from them. */
static void carry_all(tally *t)
{
    carry(t->sum, SUM_LIMBS);
    carry(t->abs, SUM_LIMBS);
    carry(t->square, SQUARE_LIMBS);
}

INLINE void see_finite(tally *t, uint64_t low, uint64_t high)
{
    if (!t->finite || low < t->min_key)
        t->min_key = low;
    if (!t->finite || high > t->max_key)
        t->max_key = high;
    t->finite = 1;
}

INLINE wide multiply(uint64_t a, uint64_t b)
{
    wide product;
#ifdef __SIZEOF_INT128__
    unsigned __int128 p = (unsigned __int128)a * b;
    product.low = (uint64_t)p;
    product.high = (uint64_t)(p >> 64);
#else
    uint64_t al = a & 0xffffffff, ah = a >> 32, bl = b & 0xffffffff, bh = b >> 32;
    uint64_t ll = al * bl, lh = al * bh, hl = ah * bl;
    uint64_t middle = (ll >> 32) + (lh & 0xffffffff) + (hl & 0xffffffff);
    product.low = (middle << 32) | (ll & 0xffffffff);
    product.high = ah * bh + (lh >> 32) + (hl >> 32) + (middle >> 32);
#endif
    return product;
}

#endif
