/* Integers of 32 and 64 bits: counts, and exact sums.
 *
 * The code of a magnitude: itself below 256, else its exponent and 7 bits below its first; with
 * the sign around 2^15, so that the codes stand in the order of the values.
 */

#include "_kernels_count.h"
#include "_kernels_sums.h"

/* What lies between the code of a magnitude of 128 or more and the top 18 bits of its float64 without the sign. */
enum { CODE_OFFSET = (1023 + 6) << 7 };

INLINE unsigned code_of_integer(double value, uint64_t magnitude, uint64_t sign)
{
    uint64_t bits;
    memcpy(&bits, &value, 8);
    uint64_t code = magnitude < 128 ? magnitude : ((bits >> 45) & 0x3ffff) - CODE_OFFSET;
    return (unsigned)((code ^ sign) - sign + 32768);
}

/* FLOAT(v, magnitude) is the value or its magnitude as a float64 with at least 8 correct bits, rounded towards zero. */
#define DEFINE_INTEGERS(NAME, TYPE, SIGNED, FLOAT)                                                                     \
    INLINE void NAME(tally *t, const uint8_t *data, size_t n, int mark)                                                \
    {                                                                                                                  \
        uint16_t codes[BLOCK];                                                                                         \
        const uint64_t flip = SIGNED ? 0x8000000000000000 : 0;                                                         \
        for (size_t i = 0; i < n; i += BLOCK) {                                                                        \
            size_t m = n - i < BLOCK ? n - i : BLOCK;                                                                  \
            uint64_t low = 0, abs[2] = {0, 0}, square[4] = {0, 0, 0, 0}, zeros = 0;                                    \
            int64_t high = 0;                                                                                          \
            TYPE min, max;                                                                                             \
            memcpy(&min, data, sizeof min);                                                                            \
            max = min;                                                                                                 \
            for (size_t j = 0; j < m; j++) {                                                                           \
                TYPE v;                                                                                                \
                memcpy(&v, data + j * sizeof v, sizeof v);                                                             \
                uint64_t x = SIGNED ? (uint64_t)(int64_t)v : (uint64_t)v;                                              \
                uint64_t sign = SIGNED && v < 0 ? UINT64_MAX : 0;                                                      \
                uint64_t magnitude = (x ^ sign) - sign;                                                                \
                min = v < min ? v : min;                                                                               \
                max = v > max ? v : max;                                                                               \
                zeros += v == 0;                                                                                       \
                low += x & 0xffffffff;                                                                                 \
                high += SIGNED ? (int64_t)x >> 32 : (int64_t)(x >> 32);                                                \
                abs[0] += magnitude & 0xffffffff;                                                                      \
                if (sizeof v == 8) {                                                                                   \
                    wide p = multiply(magnitude, magnitude);                                                           \
                    abs[1] += magnitude >> 32;                                                                         \
                    square[0] += p.low & 0xffffffff;                                                                   \
                    square[1] += p.low >> 32;                                                                          \
                    square[2] += p.high & 0xffffffff;                                                                  \
                    square[3] += p.high >> 32;                                                                         \
                } else {                                                                                               \
                    uint64_t p = (uint64_t)(uint32_t)magnitude * (uint32_t)magnitude;                                  \
                    square[0] += p & 0xffffffff;                                                                       \
                    square[1] += p >> 32;                                                                              \
                }                                                                                                      \
            }                                                                                                          \
            for (size_t j = 0; j < m; j++) { /* a loop of its own, which compilers put into vectors */                 \
                TYPE v;                                                                                                \
                memcpy(&v, data + j * sizeof v, sizeof v);                                                             \
                uint64_t x = SIGNED ? (uint64_t)(int64_t)v : (uint64_t)v;                                              \
                uint64_t sign = SIGNED && v < 0 ? UINT64_MAX : 0;                                                      \
                uint64_t magnitude = (x ^ sign) - sign;                                                                \
                codes[j] = (uint16_t)code_of_integer(FLOAT(v, magnitude), magnitude, sign);                            \
            }                                                                                                          \
            data += m * sizeof(TYPE);                                                                                  \
            if (all_equal((const uint8_t *)codes, 2 * m, 2))                                                           \
                t->high[codes[0]] += m;                                                                                \
            else                                                                                                       \
                count_codes(t, (const uint8_t *)codes, m, 2, 0);                                                       \
            for (size_t j = 0; mark && j < m; j++)                                                                     \
                t->marks[codes[j] / GROUP] = 1;                                                                        \
            add_unsigned(t->sum, 0, low);                                                                              \
            add_signed(t->sum, 32, high);                                                                              \
            for (int k = 0; k < 2; k++)                                                                                \
                add_unsigned(t->abs, 32 * k, abs[k]);                                                                  \
            for (int k = 0; k < 4; k++)                                                                                \
                add_unsigned(t->square, 32 * k, square[k]);                                                            \
            t->zeros += zeros;                                                                                         \
            see_finite(t, (SIGNED ? (uint64_t)(int64_t)min : (uint64_t)min) ^ flip,                                    \
                       (SIGNED ? (uint64_t)(int64_t)max : (uint64_t)max) ^ flip);                                      \
            if (i / BLOCK % 1024 == 1023)                                                                              \
                carry_all(t);                                                                                          \
        }                                                                                                              \
    }

#define FLOAT_I32(v, magnitude) ((double)(v))
/* Signed integers are what vector units convert. */
#define FLOAT_U32(v, magnitude) ((double)(int32_t)((v) ^ 0x80000000) + 2147483648.0)
/* The magnitude without the bits that would be rounded. */
#define FLOAT_64(v, magnitude)                                                                                         \
    ((magnitude) >> 53 ? (double)(int64_t)((magnitude) >> 11) * 2048 : (double)(int64_t)(magnitude))

DEFINE_INTEGERS(update_i32, int32_t, 1, FLOAT_I32)
DEFINE_INTEGERS(update_u32, uint32_t, 0, FLOAT_U32)
DEFINE_INTEGERS(update_i64, int64_t, 1, FLOAT_64)
DEFINE_INTEGERS(update_u64, uint64_t, 0, FLOAT_64)

#define DEFINE_LEVEL(TARGET, NUMBER)                                                                                   \
    TARGET void update_i32_##NUMBER(tally *t, const uint8_t *data, size_t n, int mark)                                 \
    {                                                                                                                  \
        update_i32(t, data, n, mark);                                                                                  \
    }                                                                                                                  \
    TARGET void update_u32_##NUMBER(tally *t, const uint8_t *data, size_t n, int mark)                                 \
    {                                                                                                                  \
        update_u32(t, data, n, mark);                                                                                  \
    }                                                                                                                  \
    TARGET void update_i64_##NUMBER(tally *t, const uint8_t *data, size_t n, int mark)                                 \
    {                                                                                                                  \
        update_i64(t, data, n, mark);                                                                                  \
    }                                                                                                                  \
    TARGET void update_u64_##NUMBER(tally *t, const uint8_t *data, size_t n, int mark)                                 \
    {                                                                                                                  \
        update_u64(t, data, n, mark);                                                                                  \
    }

DEFINE_LEVEL(, 0)
#if X86
DEFINE_LEVEL(AVX2, 1)
DEFINE_LEVEL(AVX512, 2)
#endif
