/* Counting the values of a small tensor: one scan for each kind. */

#ifndef TORCHPARAMS_BATCH_SCAN_H
#define TORCHPARAMS_BATCH_SCAN_H

#include "_batch.h"

INLINE void count(state *t, uint32_t code)
{
    t->counts[code]++;
    t->used[code >> 6] |= (uint64_t)1 << (code & 63);
}

static void scan_p8(state *t, const uint8_t *data, size_t n, int boolean)
{
    for (size_t i = 0; i < n; i++)
        count(t, boolean ? data[i] != 0 : data[i]);
}

static void scan_p16(state *t, const uint8_t *data, size_t n, seen *s)
{
    uint32_t least = 0x7fff, most = 0; /* magnitudes of floats; least: of those that are not 0, less 1 */
    for (size_t i = 0; i < n; i++) {
        uint16_t code;
        memcpy(&code, data + 2 * i, 2);
        count(t, code);
        uint32_t magnitude = code & 0x7fff, less = (magnitude - 1) & 0x7fff;
        most = magnitude > most ? magnitude : most;
        least = less < least ? less : least;
    }
    s->first = least >> 6, s->last = (most >> 6) + 1;
}

/* Of float32: the range of finite values as keys (of negative values the bits below the sign inverted), and counts. */
typedef struct {
    int32_t min, max;
    uint32_t zeros, posinf, neginf, finite, least, most; /* magnitudes; least: of those that are not 0, less 1 */
} survey;

INLINE survey survey_f32(const uint8_t *data, size_t n)
{
    int32_t min = INT32_MAX, max = INT32_MIN;
    uint32_t zeros = 0, posinf = 0, neginf = 0, finite = 0, least = UINT32_MAX, most = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, data + 4 * i, 4);
        uint32_t magnitude = bits & 0x7fffffff;
        int32_t key = (int32_t)(bits ^ ((uint32_t)((int32_t)bits >> 31) >> 1)), skip = -(magnitude >= 0x7f800000);
        int32_t low = (key & ~skip) | (INT32_MAX & skip), high = (key & ~skip) | (INT32_MIN & skip);
        min = low < min ? low : min;
        max = high > max ? high : max;
        zeros += magnitude == 0;
        posinf += bits == 0x7f800000;
        neginf += bits == 0xff800000;
        finite += magnitude < 0x7f800000;
        most = magnitude > most ? magnitude : most;
        least = magnitude - 1 < least ? magnitude - 1 : least;
    }
    return (survey){min, max, zeros, posinf, neginf, finite, least, most};
}

static survey survey_base(const uint8_t *data, size_t n)
{
    return survey_f32(data, n);
}

#if X86
TARGET("avx2") static survey survey_avx2(const uint8_t *data, size_t n)
{
    return survey_f32(data, n);
}
#endif

static survey (*survey_best)(const uint8_t *, size_t) = survey_base;

/* Uses the best vector unit of this machine from now on. */
static void choose_unit(void)
{
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2"))
        survey_best = survey_avx2;
#endif
}

static void scan_f32(state *t, const uint8_t *data, size_t n, seen *s)
{
    survey found = survey_best(data, n);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, data + 4 * i, 4);
        uint64_t m = (bits & 0x7fffff) | (bits & 0x7f800000 ? 0x800000 : 0);
        uint64_t *b = t->near[bits >> 23];
        b[0] += m;
        b[1] += m * m; /* 2^16 squares of 48 bits */
        count(t, bits >> 16);
    }
    unsigned first = found.most ? (found.least + 1) >> 23 : 0, last = found.most >> 23;
    s->first = 2 * first, s->last = 2 * last + 2;
    for (unsigned e = 0; e <= last; e = e < first ? first : e + 1) {
        uint64_t *plus = t->near[e], *minus = t->near[e + 256];
        if (!(plus[0] | minus[0]))
            continue;
        if (e < 255) { /* NaN and infinities are excluded from sums */
            t->bins[e].sum[0] = plus[0];
            t->bins[e].sum[1] = minus[0];
            t->bins[e].square = (u128)plus[1] + minus[1];
            t->bins_used[e >> 6] |= (uint64_t)1 << (e & 63);
        }
        memset(plus, 0, 16);
        memset(minus, 0, 16);
    }
    s->zeros = found.zeros, s->posinf = found.posinf, s->neginf = found.neginf, s->finite = found.finite;
    if (found.finite) {
        s->min = value_of_f32((uint32_t)found.min ^ ((uint32_t)(found.min >> 31) >> 1)) + 0.0;
        s->max = value_of_f32((uint32_t)found.max ^ ((uint32_t)(found.max >> 31) >> 1)) + 0.0;
    }
}

static void scan_f64(state *t, const uint8_t *data, size_t n, seen *s)
{
    int64_t min = INT64_MAX, max = INT64_MIN;
    uint64_t least = INT64_MAX, most = 0; /* magnitudes; least: of those that are not 0, less 1 */
    for (size_t i = 0; i < n; i++) {
        uint64_t bits;
        memcpy(&bits, data + 8 * i, 8);
        uint64_t magnitude = bits & INT64_MAX, less = (magnitude - 1) & INT64_MAX;
        most = magnitude > most ? magnitude : most;
        least = less < least ? less : least;
        count(t, (uint32_t)(bits >> 45));
        if (magnitude < 0x7ff0000000000000) {
            int64_t key = (int64_t)(bits ^ ((uint64_t)((int64_t)bits >> 63) >> 1));
            min = key < min ? key : min;
            max = key > max ? key : max;
            s->finite++;
            s->zeros += magnitude == 0;
            if (magnitude)
                add_double(t, bits, 1);
        }
        s->posinf += bits == 0x7ff0000000000000;
        s->neginf += bits == 0xfff0000000000000;
    }
    s->first = least >> 51, s->last = (most >> 51) + 1;
    if (s->finite) {
        uint64_t low = (uint64_t)min ^ ((uint64_t)(min >> 63) >> 1), high = (uint64_t)max ^ ((uint64_t)(max >> 63) >> 1);
        s->min = from_bits(low << 1 ? low : 0);
        s->max = from_bits(high << 1 ? high : 0);
    }
}

/* The code of a magnitude: see magnitude_codes. */
INLINE uint32_t magnitude_code(uint64_t v)
{
    int shift = v < 256 ? 0 : 56 - __builtin_clzll(v);
    return (uint32_t)shift * 128 + (uint32_t)(v >> shift);
}

#define DEFINE_SCAN(NAME, TYPE, SIGN)                                                                                  \
    static void NAME(state *t, const uint8_t *data, size_t n, seen *s)                                                 \
    {                                                                                                                  \
        TYPE min = 0, max = 0;                                                                                         \
        for (size_t i = 0; i < n; i++) {                                                                               \
            TYPE v;                                                                                                    \
            memcpy(&v, data + i * sizeof v, sizeof v);                                                                 \
            int negative = SIGN && v < 0;                                                                              \
            uint64_t x = (uint64_t)v, magnitude = negative ? 0 - x : x;                                                \
            u128 p = (u128)magnitude * magnitude;                                                                      \
            min = !i || v < min ? v : min;                                                                             \
            max = !i || v > max ? v : max;                                                                             \
            s->zeros += !v;                                                                                            \
            t->magnitudes[negative] += magnitude;                                                                      \
            t->squares[0] += (uint64_t)p;                                                                              \
            t->squares[1] += (uint64_t)(p >> 64);                                                                      \
            count(t, negative ? 32768 - magnitude_code(magnitude) : 32768 + magnitude_code(magnitude));                \
        }                                                                                                              \
        s->finite = n;                                                                                                 \
        s->min = (double)min, s->max = (double)max;                                                                    \
        s->low = (uint64_t)min, s->high = (uint64_t)max;                                                               \
        uint64_t a = SIGN && min < 0 ? 0 - s->low : s->low, b = SIGN && max < 0 ? 0 - s->high : s->high;               \
        s->reach = a > b ? a : b;                                                                                      \
    }

DEFINE_SCAN(scan_i32, int32_t, 1)
DEFINE_SCAN(scan_u32, uint32_t, 0)
DEFINE_SCAN(scan_i64, int64_t, 1)
DEFINE_SCAN(scan_u64, uint64_t, 0)

/* Counts the `n` values of a tensor. */
static void scan(state *t, const form *f, const uint8_t *data, size_t n, seen *s)
{
    switch (f->kind) {
    case P8: scan_p8(t, data, n, f->boolean); break;
    case P16: scan_p16(t, data, n, s); break;
    case F32: scan_f32(t, data, n, s); break;
    case F64: scan_f64(t, data, n, s); break;
    case I32: scan_i32(t, data, n, s); break;
    case U32: scan_u32(t, data, n, s); break;
    case I64: scan_i64(t, data, n, s); break;
    default: scan_u64(t, data, n, s);
    }
}

#endif
