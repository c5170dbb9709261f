/* Float32: counts, and exact sums.
 *
 * x = m·2^(e-150), m an integer of 24 bits. Where the exponents of a block span at most 21 and
 * none is subnormal, 256 values add exactly in a double, in any order, and so do their squares
 * once each is split in a multiple of 2^(2E-43) and the rest (E the greatest exponent):
 *   sum      256·2^(E+1) <= 2^53·2^(Emin-23)
 *   upper    256·2^(2E+2) <= 2^53·2^(2E-43)
 *   rest     256·2^(2E-44) <= 2^53·2^(2·Emin-46)
 * Other blocks are added as integers, mantissas of one exponent together.
 */

#include "_kernels_count.h"
#include "_kernels_sums.h"

enum {
    UNIT32 = 149,
    SPAN32 = 21,
    HOLD32 = 1 << 16, /* squares of 48 bits that 64 bits hold */
};

typedef struct {
    int32_t min, max;  /* of the keys: bits, of negative values those below the sign inverted */
    uint32_t smallest; /* of the magnitudes' bits less 1: zero is the greatest */
    uint32_t zeros;
} range32;

INLINE int32_t key32(uint32_t bits)
{
    return (int32_t)(bits ^ ((uint32_t)((int32_t)bits >> 31) >> 1));
}

INLINE uint32_t bits32(int32_t key)
{
    return (uint32_t)key ^ ((uint32_t)(key >> 31) >> 1);
}

#if VECTORS
INLINE double power_of_two(int e)
{
    uint64_t bits = (uint64_t)(e + 1023) << 52;
    double d;
    memcpy(&d, &bits, 8);
    return d;
}

/* A sum as an integer. It is arbitrary, and not used, if values were outside their range. */
INLINE int64_t whole(double sum)
{
    return sum >= -0x1p53 && sum <= 0x1p53 ? (int64_t)sum : 0;
}

/* Exact sums of a block, as integers: in units of 2^(low-23), of 2^(2·high-43) and of 2^(2·low-46). */
typedef struct {
    int64_t sum, abs, upper, rest;
} sums32;

/* Sums of `n` values, a multiple of 2·WIDTH of at most BLOCK, which are zero or have an exponent, not biased, in
 * [low, high], high - low <= SPAN32. With `counting` it counts their codes too, and finds the range that tells whether
 * they were in it: counting is bound by stores, the sums by arithmetic, and in one loop they overlap.
 *
 * WIDTH is that of a vector, in doubles. WIDEN(p) loads so many floats; LEAST, MOST and LEAST_UNSIGNED compare the
 * 32-bit lanes of two vectors. */
#define DEFINE_SUMS_F32(NAME, TARGET, WIDTH, WIDEN, LEAST, MOST, LEAST_UNSIGNED)                                       \
    typedef double NAME##_d __attribute__((vector_size(8 * WIDTH)));                                                   \
    typedef int64_t NAME##_l __attribute__((vector_size(8 * WIDTH)));                                                  \
    typedef float NAME##_f __attribute__((vector_size(4 * WIDTH)));                                                    \
    typedef int32_t NAME##_i __attribute__((vector_size(8 * WIDTH)));                                                  \
    typedef uint32_t NAME##_u __attribute__((vector_size(8 * WIDTH)));                                                 \
                                                                                                                       \
    TARGET INLINE int64_t NAME##_total(const NAME##_d *lanes, double scale)                                            \
    {                                                                                                                  \
        int64_t sum = 0;                                                                                               \
        for (int k = 0; k < WIDTH; k++)                                                                                \
            sum += whole(lanes[0][k] * scale) + whole(lanes[1][k] * scale);                                            \
        return sum;                                                                                                    \
    }                                                                                                                  \
                                                                                                                       \
    TARGET INLINE sums32 NAME(tally *t, const uint8_t *data, size_t n, int low, int high, const int counting,          \
                              range32 *range)                                                                          \
    {                                                                                                                  \
        double c = 1.5 * power_of_two(2 * high - 43 + 52), scale = power_of_two(23 - low);                             \
        size_t most = 256 * 2 * WIDTH;                                                                                 \
        if (counting)                                                                                                  \
            expect_near(t, n);                                                                                         \
        sums32 totals = {0, 0, 0, 0};                                                                                  \
        NAME##_i min = (NAME##_i){0} + INT32_MAX, max = (NAME##_i){0} + INT32_MIN;                                     \
        NAME##_u smallest = (NAME##_u){0} - 1, zeros = {0};                                                            \
        for (size_t i = 0; i < n; i += most) {                                                                         \
            NAME##_d sum[2] = {{0}}, abs[2] = {{0}}, upper[2] = {{0}}, rest[2] = {{0}};                                \
            const uint8_t *end = data + 4 * (n - i < most ? n - i : most);                                             \
            for (; data < end; data += 8 * WIDTH) {                                                                    \
                if (counting)                                                                                          \
                    PREFETCH(data + AHEAD);                                                                            \
                for (int j = 0; j < 2; j++) {                                                                          \
                    NAME##_d x = (NAME##_d)WIDEN(NAME, data + 4 * WIDTH * j);                                          \
                    NAME##_d square = x * x, split = (square + c) - c;                                                 \
                    sum[j] += x;                                                                                       \
                    abs[j] += (NAME##_d)((NAME##_l)x & INT64_MAX);                                                     \
                    upper[j] += split;                                                                                 \
                    rest[j] += square - split;                                                                         \
                }                                                                                                      \
                if (counting) {                                                                                        \
                    NAME##_i bits;                                                                                     \
                    memcpy(&bits, data, 8 * WIDTH);                                                                    \
                    NAME##_i key = bits ^ (NAME##_i)((NAME##_u)(bits >> 31) >> 1);                                     \
                    NAME##_u magnitude = (NAME##_u)bits & 0x7fffffff, before = magnitude - 1;                          \
                    min = LEAST(NAME##_i, key, min);                                                                   \
                    max = MOST(NAME##_i, key, max);                                                                    \
                    smallest = LEAST_UNSIGNED(NAME##_u, before, smallest);                                             \
                    zeros -= (NAME##_u)(magnitude == 0);                                                               \
                    for (int k = 0; k < 2 * WIDTH; k++)                                                                \
                        count_near(t, k % SUBTABLES, load16(data + 4 * k + 2));                                        \
                }                                                                                                      \
            }                                                                                                          \
            totals.sum += NAME##_total(sum, scale);                                                                    \
            totals.abs += NAME##_total(abs, scale);                                                                    \
            totals.upper += NAME##_total(upper, power_of_two(43 - 2 * high));                                          \
            totals.rest += NAME##_total(rest, power_of_two(46 - 2 * low));                                             \
        }                                                                                                              \
        if (counting) {                                                                                                \
            range32 r = {INT32_MAX, INT32_MIN, UINT32_MAX, 0};                                                         \
            for (int k = 0; k < 2 * WIDTH; k++) {                                                                      \
                r.min = min[k] < r.min ? min[k] : r.min;                                                               \
                r.max = max[k] > r.max ? max[k] : r.max;                                                               \
                r.smallest = smallest[k] < r.smallest ? smallest[k] : r.smallest;                                      \
                r.zeros += zeros[k];                                                                                   \
            }                                                                                                          \
            *range = r;                                                                                                \
        }                                                                                                              \
        return totals;                                                                                                 \
    }

#define WIDEN_ANY(NAME, p) __builtin_convertvector(*(NAME##_f *)memcpy(&(NAME##_f){0}, p, sizeof(NAME##_f)), NAME##_d)
#define LEAST_ANY(TYPE, a, b) (((a) & (TYPE)((a) < (b))) | ((b) & ~(TYPE)((a) < (b))))
#define MOST_ANY(TYPE, a, b) (((a) & (TYPE)((a) > (b))) | ((b) & ~(TYPE)((a) > (b))))
DEFINE_SUMS_F32(sums_f32_16, , 2, WIDEN_ANY, LEAST_ANY, MOST_ANY, LEAST_ANY)

#if X86
#define WIDEN_256(NAME, p) _mm256_cvtps_pd(_mm_loadu_ps((const float *)(p)))
#define LEAST_256(TYPE, a, b) (TYPE) _mm256_min_epi32((__m256i)(a), (__m256i)(b))
#define MOST_256(TYPE, a, b) (TYPE) _mm256_max_epi32((__m256i)(a), (__m256i)(b))
#define LEAST_UNSIGNED_256(TYPE, a, b) (TYPE) _mm256_min_epu32((__m256i)(a), (__m256i)(b))
DEFINE_SUMS_F32(sums_f32_32, AVX2, 4, WIDEN_256, LEAST_256, MOST_256, LEAST_UNSIGNED_256)

#define WIDEN_512(NAME, p) _mm512_cvtps_pd(_mm256_loadu_ps((const float *)(p)))
#define LEAST_512(TYPE, a, b) (TYPE) _mm512_min_epi32((__m512i)(a), (__m512i)(b))
#define MOST_512(TYPE, a, b) (TYPE) _mm512_max_epi32((__m512i)(a), (__m512i)(b))
#define LEAST_UNSIGNED_512(TYPE, a, b) (TYPE) _mm512_min_epu32((__m512i)(a), (__m512i)(b))
DEFINE_SUMS_F32(sums_f32_64, AVX512, 8, WIDEN_512, LEAST_512, MOST_512, LEAST_UNSIGNED_512)
#endif

/* Known at compile time, so that it is inlined into the function that it is passed to. */
typedef sums32 (*sums_function)(tally *, const uint8_t *, size_t, int, int, const int, range32 *);

static void add_sums32(tally *t, sums32 sums, int low, int high)
{
    add_signed(t->sum, UNIT32 + low - 23, sums.sum);
    add_signed(t->abs, UNIT32 + low - 23, sums.abs);
    add_signed(t->square, 2 * UNIT32 + 2 * high - 43, sums.upper);
    add_signed(t->square, 2 * UNIT32 + 2 * low - 46, sums.rest);
}
#else
typedef int sums_function; /* nothing to choose from */
enum { sums_f32_16 };
#endif

INLINE void add_pair(pair *sum, const pair *term)
{
#if VECTORS
    sum->both += term->both;
#else
    sum->v[0] += term->v[0];
    sum->v[1] += term->v[1];
#endif
}

INLINE uint32_t mantissa32(uint32_t bits)
{
    return (bits & 0x7fffff) | ((bits & 0x7f800000) ? 0x800000 : 0);
}

static void add_bin32(tally *t, unsigned bin, uint64_t sum, uint64_t square)
{
    unsigned e = bin & 255;
    int position = e ? (int)e - 1 : 0;
    add_unsigned(t->abs, position, sum);
    (bin & 256 ? subtract_unsigned : add_unsigned)(t->sum, position, sum);
    add_unsigned(t->square, 2 * position, square);
}

void flush_f32(tally *t)
{
    if (!t->held32)
        return;
    for (unsigned b = 0; b < 512; b++) {
        for (int j = 1; j < SUBTABLES; j++)
            add_pair(&t->bins32[0][b], &t->bins32[j][b]);
        if (t->bins32[0][b].v[0] && (b & 255) != 255)
            add_bin32(t, b, t->bins32[0][b].v[0], t->bins32[0][b].v[1]);
    }
    memset(t->bins32, 0, sizeof t->bins32);
    t->held32 = 0;
}

INLINE uint32_t greatest32(range32 r)
{
    uint32_t a = bits32(r.min) & 0x7fffffff, b = bits32(r.max) & 0x7fffffff;
    return a > b ? a : b;
}

INLINE void see_range32(tally *t, range32 r)
{
    if (r.min <= r.max)
        see_finite(t, (uint32_t)r.min ^ 0x80000000, (uint32_t)r.max ^ 0x80000000);
}

/* Survey of a block: range of its finite values, zeros and infinities. */
typedef struct {
    range32 range;
    uint32_t posinf, neginf, others; /* others: all that is not finite */
} survey32;

static const survey32 nothing32 = {{INT32_MAX, INT32_MIN, UINT32_MAX, 0}, 0, 0, 0};

INLINE void survey_value(survey32 *s, uint32_t bits)
{
    uint32_t magnitude = bits & 0x7fffffff;
    int32_t key = key32(bits), skip = -(int32_t)(magnitude >= 0x7f800000);
    int32_t low = (key & ~skip) | (INT32_MAX & skip), high = (key & ~skip) | (INT32_MIN & skip);
    s->range.min = low < s->range.min ? low : s->range.min;
    s->range.max = high > s->range.max ? high : s->range.max;
    s->range.smallest = magnitude - 1 < s->range.smallest ? magnitude - 1 : s->range.smallest;
    s->range.zeros += magnitude == 0;
    s->posinf += bits == 0x7f800000;
    s->neginf += bits == 0xff800000;
    s->others -= (uint32_t)skip;
}

INLINE survey32 survey_f32(const uint8_t *data, size_t n)
{
    survey32 s = nothing32;
    for (size_t i = 0; i < n; i++)
        survey_value(&s, load32(data + 4 * i));
    return s;
}

static void see_survey(tally *t, const survey32 *s)
{
    see_range32(t, s->range);
    t->zeros += s->range.zeros;
    t->posinf += s->posinf;
    t->neginf += s->neginf;
}

/* Sums of any block of at most HOLD32 elements; surveys a block that is `spread`. */
INLINE void sums_f32_by_exponent(tally *t, const uint8_t *data, size_t n, const int spread)
{
    pair terms[512];
    uint16_t place[512]; /* in bytes */
    uint8_t *bins = (uint8_t *)t->bins32;
    /* Neighbours of one exponent wait for each other's bin; where it is always another, one table is in the cache. */
    const size_t apart = spread ? 0 : sizeof t->bins32[0];
    survey32 s = nothing32;
    if (t->held32 + n > HOLD32)
        flush_f32(t);
    t->held32 += n;
    for (size_t i = 0; i < n; i += 512, data += 4 * 512) {
        size_t m = n - i < 512 ? n - i : 512, k;
        for (k = 0; k < m; k++) {
            uint32_t bits = load32(data + 4 * k), mantissa = mantissa32(bits);
            terms[k].v[0] = mantissa;
            terms[k].v[1] = (uint64_t)mantissa * mantissa;
            place[k] = (uint16_t)((bits >> 23) * sizeof(pair));
            if (spread)
                survey_value(&s, bits);
        }
        for (k = 0; k + 4 <= m; k += 4) {
            add_pair((pair *)(bins + place[k]), &terms[k]);
            add_pair((pair *)(bins + apart + place[k + 1]), &terms[k + 1]);
            add_pair((pair *)(bins + 2 * apart + place[k + 2]), &terms[k + 2]);
            add_pair((pair *)(bins + 3 * apart + place[k + 3]), &terms[k + 3]);
        }
        for (; k < m; k++)
            add_pair((pair *)(bins + place[k]), &terms[k]);
    }
    if (spread)
        see_survey(t, &s);
}

INLINE void equal_f32(tally *t, uint32_t bits, size_t n)
{
    uint32_t magnitude = bits & 0x7fffffff, key = (uint32_t)key32(bits) ^ 0x80000000;
    uint64_t m = mantissa32(bits);
    t->high[bits >> 16] += n;
    if (magnitude < 0x7f800000) {
        see_finite(t, key, key);
        add_bin32(t, bits >> 23, m * n, m * m * n);
    }
    t->zeros += magnitude == 0 ? n : 0;
    t->posinf += bits == 0x7f800000 ? n : 0;
    t->neginf += bits == 0xff800000 ? n : 0;
}

INLINE void block_f32(tally *t, const uint8_t *data, size_t n, sums_function sums_f32)
{
    if (all_equal(data, 4 * n, 4)) {
        equal_f32(t, load32(data), n);
        return;
    }
    if (spread_out(data + 2, n, 4)) {
        count_codes(t, data + 2, n, 4, 1);
        sums_f32_by_exponent(t, data, n, 1);
        return;
    }
#if VECTORS
    range32 r;
    int counted = t->top32 && n % 32 == 0;
    if (counted) {
        /* Speculates that the exponents are in the range of the previous block. */
        int high = (int)t->top32 - 127, low = high - SPAN32 < -126 ? -126 : high - SPAN32;
        sums32 sums = sums_f32(t, data, n, low, high, 1, &r);
        int least = (int)((r.smallest + 1) >> 23) - 127, most = (int)(greatest32(r) >> 23) - 127;
        if (most <= high && (least >= low || r.smallest == UINT32_MAX)) {
            t->zeros += r.zeros;
            see_range32(t, r);
            add_sums32(t, sums, low, high);
            return;
        }
    } else {
        count_codes(t, data + 2, n, 4, 0);
    }
    survey32 s = survey_f32(data, n);
    see_survey(t, &s);
    unsigned low = (s.range.smallest + 1) >> 23, high = s.others ? 255 : greatest32(s.range) >> 23;
    size_t done = 0;
    t->top32 = 0;
    if (high < 255 && low > 0 && high - low <= SPAN32) {
        t->top32 = high;
        done = n & ~(size_t)31;
        sums32 sums = sums_f32(t, data, done, (int)low - 127, (int)high - 127, 0, &r);
        add_sums32(t, sums, (int)low - 127, (int)high - 127);
    }
    if (done < n)
        sums_f32_by_exponent(t, data + 4 * done, n - done, 0);
#else
    (void)sums_f32;
    count_codes(t, data + 2, n, 4, 0);
    survey32 s = survey_f32(data, n);
    see_survey(t, &s);
    sums_f32_by_exponent(t, data, n, 0);
#endif
}

INLINE void update_f32(tally *t, const uint8_t *data, size_t n, int mark, sums_function sums_f32)
{
    for (size_t i = 0; i < n; i += BLOCK) {
        size_t m = n - i < BLOCK ? n - i : BLOCK;
        const uint8_t *p = data + 4 * i;
        block_f32(t, p, m, sums_f32);
        if (i / BLOCK % 1024 == 1023)
            carry_all(t);
        if (mark)
            for (size_t j = 0; j < m; j++)
                t->marks[load16(p + 4 * j + 2) / GROUP] = 1;
    }
}

void update_f32_0(tally *t, const uint8_t *data, size_t n, int mark)
{
    update_f32(t, data, n, mark, sums_f32_16);
}

#if X86
AVX2 void update_f32_1(tally *t, const uint8_t *data, size_t n, int mark)
{
    update_f32(t, data, n, mark, sums_f32_32);
}

AVX512 void update_f32_2(tally *t, const uint8_t *data, size_t n, int mark)
{
    update_f32(t, data, n, mark, sums_f32_64);
}
#endif
