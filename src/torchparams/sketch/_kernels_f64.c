/* Float64: counts, and exact sums.
 *
 * Mantissas of one exponent are added together, in 128 bits; 2^20 squares of 106 bits fit.
 */

#include "_kernels_count.h"
#include "_kernels_sums.h"

INLINE void add_wide(wide *sum, uint64_t low, uint64_t high)
{
    uint64_t before = sum->low;
    sum->low = before + low;
    sum->high += high + (sum->low < before);
}

enum { HOLD64 = 1 << 20 }; /* squares of 106 bits that 128 bits hold */

INLINE uint64_t mantissa64(uint64_t bits)
{
    return (bits & 0xfffffffffffff) | ((bits << 1) >> 53 ? 0x10000000000000 : 0);
}

void flush_f64(tally *t)
{
    if (!t->held64)
        return;
    for (unsigned b = 0; b < 4096; b++) {
        wide sum = t->bins64[b].sum, square = t->bins64[b].square;
        unsigned e = b & 2047;
        int position = e ? (int)e - 1 : 0;
        if (e == 2047 || !(sum.low | sum.high))
            continue;
        add_unsigned(t->abs, position, sum.low);
        add_unsigned(t->abs, position + 64, sum.high);
        (b & 2048 ? subtract_unsigned : add_unsigned)(t->sum, position, sum.low);
        (b & 2048 ? subtract_unsigned : add_unsigned)(t->sum, position + 64, sum.high);
        add_unsigned(t->square, 2 * position, square.low);
        add_unsigned(t->square, 2 * position + 64, square.high);
    }
    memset(t->bins64, 0, sizeof t->bins64);
    t->held64 = 0;
}

INLINE uint64_t order64(uint64_t bits)
{
    return bits ^ ((uint64_t)((int64_t)bits >> 63) | 0x8000000000000000);
}

static void block_f64(tally *t, const uint8_t *data, size_t n)
{
    uint64_t min = UINT64_MAX, max = 0, zeros = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = load64(data + 8 * i), magnitude = bits & INT64_MAX, m = mantissa64(bits), key = order64(bits);
        count_spread(t, bits >> 45);
        zeros += magnitude == 0;
        if (magnitude < 0x7ff0000000000000) {
            min = key < min ? key : min;
            max = key > max ? key : max;
        }
        wide square = multiply(m, m);
        bin64 *bin = &t->bins64[bits >> 52];
        add_wide(&bin->sum, m, 0);
        add_wide(&bin->square, square.low, square.high);
        t->posinf += bits == 0x7ff0000000000000;
        t->neginf += bits == 0xfff0000000000000;
    }
    t->zeros += zeros;
    if (min <= max)
        see_finite(t, min, max);
}

void update_f64(tally *t, const uint8_t *data, size_t n, int mark)
{
    for (size_t i = 0; i < n; i += BLOCK) {
        size_t m = n - i < BLOCK ? n - i : BLOCK;
        const uint8_t *p = data + 8 * i;
        if (t->held64 + m > HOLD64)
            flush_f64(t);
        t->held64 += m;
        block_f64(t, p, m);
        if (i / BLOCK % 1024 == 1023)
            carry_all(t);
        if (mark)
            for (size_t j = 0; j < m; j++)
                t->marks[load64(p + 8 * j) >> 45 >> 4] = 1;
    }
}
