/* Counters of codes, inlined into the loops.
 *
 * Values that lie close together, as weights do, meet the same counters soon again: four subtables
 * keep equal neighbours apart. Values that are spread over all patterns would drive four tables out of
 * the cache: they have one, of bytes, of which one that overflows adds 256 to its wide partner. For
 * random bits that is more than twice as fast, and for constant data four times as slow.
 */

#ifndef TORCHPARAMS_KERNELS_COUNT_H
#define TORCHPARAMS_KERNELS_COUNT_H

#include "_kernels.h"

INLINE void count_spread(tally *t, size_t code)
{
    if (UNLIKELY(!++t->low[code]))
        t->high[code] += 256;
}

INLINE void count_near(tally *t, int table, size_t code)
{
    t->tables[(size_t)table * STRIDE + code]++;
}

/* Makes room for `n` more values in the subtables, whose counters have 32 bits. */
INLINE void expect_near(tally *t, size_t n)
{
    if (UNLIKELY(t->nearby + n > UINT32_MAX)) {
        for (size_t j = 0; j < SUBTABLES; j++)
            for (size_t c = 0; c < SHORT; c++)
                t->high[c] += t->tables[j * STRIDE + c];
        memset(t->tables, 0, sizeof t->tables);
        t->nearby = 0;
    }
    t->nearby += n;
}

INLINE uint64_t load64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

INLINE uint32_t load32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

INLINE unsigned load16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

INLINE int all_equal(const uint8_t *data, size_t nbytes, size_t size)
{
    return nbytes > 64 * size && memcmp(data, data + size, nbytes - size) == 0;
}

/* The codes are the 16 bits at `data`, `data + size`, … */
INLINE void count_codes(tally *t, const uint8_t *data, size_t n, size_t size, const int spread)
{
    const uint8_t *end = data + n * size, *last = end - n % 8 * size;
    if (!spread)
        expect_near(t, n);
    for (; data != last; data += 8 * size) {
        PREFETCH(data + AHEAD);
        /* All are loaded first: a compiler has to assume that a count changes the data. */
        unsigned a = load16(data), b = load16(data + size), c = load16(data + 2 * size), d = load16(data + 3 * size);
        unsigned e = load16(data + 4 * size), f = load16(data + 5 * size);
        unsigned g = load16(data + 6 * size), h = load16(data + 7 * size);
        if (spread) {
            count_spread(t, a);
            count_spread(t, b);
            count_spread(t, c);
            count_spread(t, d);
            count_spread(t, e);
            count_spread(t, f);
            count_spread(t, g);
            count_spread(t, h);
        } else {
            count_near(t, 0, a);
            count_near(t, 1, b);
            count_near(t, 2, c);
            count_near(t, 3, d);
            count_near(t, 0, e);
            count_near(t, 1, f);
            count_near(t, 2, g);
            count_near(t, 3, h);
        }
    }
    for (; data != end; data += size)
        count_spread(t, load16(data));
}

#endif
