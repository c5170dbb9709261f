/* Natural numbers of many limbs, and doubles from them, rounded once. */

#ifndef TORCHPARAMS_BATCH_NATURAL_H
#define TORCHPARAMS_BATCH_NATURAL_H

#include "_batch.h"

enum { LIMBS = 72 }; /* the square of a sum of float64 takes 68 */

typedef struct {
    int n; /* limbs, the last of which is not 0 */
    uint64_t limb[LIMBS];
} natural;

static void trim(natural *a)
{
    while (a->n && !a->limb[a->n - 1])
        a->n--;
}

static void add_limb(natural *a, int at, uint64_t value)
{
    while (value) {
        while (a->n <= at)
            a->limb[a->n++] = 0;
        a->limb[at] += value;
        value = a->limb[at++] < value;
    }
}

/* a += value·2^shift */
static void add_shifted(natural *a, u128 value, int shift)
{
    int at = shift >> 6, s = shift & 63;
    uint64_t low = (uint64_t)value, high = (uint64_t)(value >> 64);
    add_limb(a, at, low << s);
    add_limb(a, at + 1, (s ? low >> (64 - s) : 0));
    add_limb(a, at + 1, high << s);
    add_limb(a, at + 2, (s ? high >> (64 - s) : 0));
}

static void add(natural *a, const natural *b)
{
    for (int i = 0; i < b->n; i++)
        add_limb(a, i, b->limb[i]);
}

static int compare(const natural *a, const natural *b)
{
    if (a->n != b->n)
        return a->n < b->n ? -1 : 1;
    for (int i = a->n; i-- > 0;)
        if (a->limb[i] != b->limb[i])
            return a->limb[i] < b->limb[i] ? -1 : 1;
    return 0;
}

/* a -= b, which is not greater */
static void subtract(natural *a, const natural *b)
{
    uint64_t borrow = 0;
    for (int i = 0; i < a->n; i++) {
        uint64_t x = a->limb[i], y = i < b->n ? b->limb[i] : 0, d = x - y;
        a->limb[i] = d - borrow;
        borrow = (x < y) | (d < borrow);
    }
    trim(a);
}

static void multiply(natural *a, uint64_t factor)
{
    uint64_t carry = 0;
    for (int i = 0; i < a->n; i++) {
        u128 p = (u128)a->limb[i] * factor + carry;
        a->limb[i] = (uint64_t)p;
        carry = (uint64_t)(p >> 64);
    }
    if (carry)
        a->limb[a->n++] = carry;
}

static void square(natural *out, const natural *a)
{
    out->n = 2 * a->n;
    memset(out->limb, 0, sizeof(uint64_t) * (size_t)out->n);
    for (int i = 0; i < a->n; i++) {
        uint64_t carry = 0;
        for (int j = 0; j < a->n; j++) {
            u128 p = (u128)a->limb[i] * a->limb[j] + out->limb[i + j] + carry;
            out->limb[i + j] = (uint64_t)p;
            carry = (uint64_t)(p >> 64);
        }
        out->limb[i + a->n] += carry;
    }
    trim(out);
}

static int length(u128 v)
{
    uint64_t high = (uint64_t)(v >> 64), low = (uint64_t)v;
    return high ? 128 - __builtin_clzll(high) : low ? 64 - __builtin_clzll(low) : 0;
}

/* (v + something below 1 where `more`)·2^exponent, to the nearest, ties to even; v has 55 bits at least, or is exact.
 * Without arithmetic on floats: a process may be set to take subnormal numbers for zero. */
static double rounded(u128 v, int more, int exponent)
{
    int bits = length(v), top = bits - 1 + exponent, keep = top >= -1022 ? 53 : 1075 + top;
    if (!bits)
        return 0;
    if (top > 1023)
        return INFINITY;
    int drop = bits - keep;
    if (drop > bits)
        return 0;
    uint64_t m;
    if (drop <= 0) {
        m = (uint64_t)v << -drop;
    } else {
        u128 half = (u128)1 << (drop - 1), rest = v & (half | (half - 1));
        m = drop < 128 ? (uint64_t)(v >> drop) : 0;
        m += rest > half || (rest == half && (more || (m & 1)));
    }
    return from_bits(((uint64_t)(exponent + drop + 1074) << 52) + m);
}

/* The leading 128 bits of a / divisor, times 2^exponent; and whether more bits follow. */
static u128 quotient(const natural *a, uint64_t divisor, int *exponent, int *more)
{
    natural q;
    int pad = a->n < 4 ? 4 - a->n : 0; /* so that no bit is missed */
    q.n = a->n + pad;
    memset(q.limb, 0, sizeof(uint64_t) * (size_t)pad);
    memcpy(q.limb + pad, a->limb, sizeof(uint64_t) * (size_t)a->n);
    *exponent = -64 * pad;
    uint64_t rest = 0;
    if (divisor > 1)
        for (int i = q.n; i-- > 0;) {
            u128 part = (u128)rest << 64 | q.limb[i];
            q.limb[i] = (uint64_t)(part / divisor);
            rest = (uint64_t)(part % divisor);
        }
    trim(&q);
    int s = __builtin_clzll(q.limb[q.n - 1]);
    u128 first = (u128)q.limb[q.n - 1] << 64 | q.limb[q.n - 2];
    *more = rest != 0;
    if (s) {
        first = first << s | q.limb[q.n - 3] >> (64 - s);
        *more |= (q.limb[q.n - 3] << s) != 0;
    } else {
        *more |= q.limb[q.n - 3] != 0;
    }
    for (int i = 0; i < q.n - 3; i++)
        *more |= q.limb[i] != 0;
    *exponent += 64 * (q.n - 2) - s;
    return first;
}

/* a / divisor·2^unit */
static double ratio(const natural *a, int negative, uint64_t divisor, int unit)
{
    int exponent, more;
    if (!a->n)
        return 0;
    u128 first = quotient(a, divisor, &exponent, &more);
    double found = rounded(first, more, exponent + unit);
    return negative ? -found : found;
}

/* sqrt(a / divisor)·2^unit */
static double root(const natural *a, uint64_t divisor, int unit)
{
    int exponent, more;
    if (!a->n)
        return 0;
    u128 v = quotient(a, divisor, &exponent, &more);
    if (exponent & 1) {
        more |= (int)(v & 1);
        v >>= 1;
        exponent++;
    }
    double guess = sqrt((double)v);
    u128 r = guess < 0x1p64 ? (u128)guess : UINT64_MAX;
    r = (r + v / r) / 2; /* from 52 right bits to all */
    r = r > UINT64_MAX ? UINT64_MAX : r;
    while (r * r > v)
        r--;
    while (r < UINT64_MAX && (r + 1) * (r + 1) <= v)
        r++;
    return rounded(r, more || r * r != v, exponent / 2 + unit);
}

#endif
