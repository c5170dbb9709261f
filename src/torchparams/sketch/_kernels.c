/* Kernels of the sketch: counts of bit patterns, and exact sums of wide values.
 *
 * kernels.py defines the results, in NumPy; nothing here may give another
 * result. Every sum is exact, so the order of the additions, the width of the vectors and the way
 * a tensor is cut into blocks do not matter.
 *
 * A tally is a block of memory owned by the caller (`size()` bytes, zeros to begin with):
 *
 *   update(tally, kind, data, mark)   counts `data`; the global interpreter lock is released
 *   finish(tally, kind)               returns the result, and resets the tally
 */

#include "_common.h"

/* The vector path needs IEEE doubles, and the vector extensions. */
#if defined(__GNUC__) && IEEE
#define VECTORS 1
#else
#define VECTORS 0
#endif

enum kind { P8, P16, F32, F64, I32, U32, I64, U64, KINDS };

enum {
    BLOCK = 8192,        /* elements that stay in the first-level cache from one loop to the next */
    AHEAD = 4096,        /* bytes that are asked for early: between so many stores the processor does not do it */
    CODES = 1 << 19,     /* float64 has the longest code: sign, 11 of exponent, 7 of mantissa */
    SHORT = 1 << 16,     /* codes of all other kinds */
    SUBTABLES = 4,       /* so that equal neighbours do not wait for each other's counter */
    STRIDE = SHORT + 48, /* subtables that do not start at the same place in a page */
    SUM_LIMBS = 72,      /* 32 bits each: float64 needs 2098 bits and room to grow */
    SQUARE_LIMBS = 140,
    GROUP = 16,          /* neighbouring codes that share one mark */
};

#if VECTORS
typedef uint64_t u2 __attribute__((vector_size(16)));
#endif

typedef union {
    uint64_t v[2];
#if VECTORS
    u2 both;
#endif
} pair;

typedef struct {
    uint64_t low, high;
} wide;

typedef struct {
    wide sum, square;
} bin64;

typedef struct {
    uint64_t zeros, posinf, neginf;
    uint64_t min_key, max_key; /* of finite values, in the order of unsigned integers; valid if finite */
    uint64_t finite;           /* whether there was one */
    uint64_t everywhere;       /* counters were touched without a mark */
    uint64_t nearby;           /* values in the subtables, less than 2^32 */
    uint64_t held32, held64;   /* values in the bins */
    uint64_t top32;            /* greatest exponent of the last block, biased; 0 for none */
    int64_t sum[SUM_LIMBS], abs[SUM_LIMBS], square[SQUARE_LIMBS];
    uint64_t tail[256]; /* bytes without a partner: P8 counts pairs */
    uint8_t marks[CODES / GROUP];
    uint64_t high[CODES];
    uint8_t low[CODES];
    uint32_t tables[SUBTABLES * STRIDE];
    pair bins32[SUBTABLES][512]; /* sums and squares of mantissas, by sign and exponent */
    bin64 bins64[4096];
    uint32_t codes[CODES]; /* where finish() collects */
    uint64_t counts[CODES];
} tally;

static const int item_size[KINDS] = {1, 2, 4, 8, 4, 4, 8, 8};

/* --- counting ---------------------------------------------------------------------------------
 *
 * Values that lie close together, as weights do, meet the same counters soon again: four subtables
 * keep equal neighbours apart. Values that are spread over all patterns would drive four tables out of
 * the cache: they have one, of bytes, of which one that overflows adds 256 to its wide partner. For
 * random bits that is more than twice as fast, and for constant data four times as slow.
 */

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

/* Whether 64 samples of `n` codes, one every `size` bytes, are widely spread. They are taken where the data
 * is in the cache already: from the first AHEAD bytes. */
static int spread_out(const uint8_t *data, size_t n, size_t size)
{
    uint8_t seen[1024] = {0};
    int places = 0;
    if (n * size < AHEAD)
        return 0;
    for (size_t i = 0; i < AHEAD; i += AHEAD / 64) {
        uint8_t *place = &seen[load16(data + i) >> 6];
        places += !*place;
        *place = 1;
    }
    return places > 40;
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

static void update_p16(tally *t, const uint8_t *data, size_t n, int mark)
{
    for (size_t i = 0; i < n; i += 2 * BLOCK) {
        size_t m = n - i < 2 * BLOCK ? n - i : 2 * BLOCK;
        const uint8_t *p = data + 2 * i;
        if (all_equal(p, 2 * m, 2))
            t->high[load16(p)] += m;
        else if (spread_out(p, m, 2))
            count_codes(t, p, m, 2, 1);
        else
            count_codes(t, p, m, 2, 0);
        if (mark)
            for (size_t j = 0; j < m; j++)
                t->marks[load16(p + 2 * j) / GROUP] = 1;
    }
}

static void update_p8(tally *t, const uint8_t *data, size_t n, int mark)
{
    /* One counter for two neighbours: half the work, the same counts once finish() parts them. */
    update_p16(t, data, n / 2, mark);
    if (n & 1)
        t->tail[data[n - 1]]++;
}

/* --- exact sums -------------------------------------------------------------------------------
 *
 * A sum is a fixed-point number of many 32-bit limbs, each in an int64 with 31 bits to spare, in
 * units of the smallest subnormal (of its square, for squares).
 */

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

/* --- float32 ----------------------------------------------------------------------------------
 *
 * x = m·2^(e-150), m an integer of 24 bits. Where the exponents of a block span at most 21 and
 * none is subnormal, 256 values add exactly in a double, in any order, and so do their squares
 * once each is split in a multiple of 2^(2E-43) and the rest (E the greatest exponent):
 *   sum      256·2^(E+1) <= 2^53·2^(Emin-23)
 *   upper    256·2^(2E+2) <= 2^53·2^(2E-43)
 *   rest     256·2^(2E-44) <= 2^53·2^(2·Emin-46)
 * Other blocks are added as integers, mantissas of one exponent together.
 */

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
#define AVX2 TARGET("avx2,fma")
#define WIDEN_256(NAME, p) _mm256_cvtps_pd(_mm_loadu_ps((const float *)(p)))
#define LEAST_256(TYPE, a, b) (TYPE) _mm256_min_epi32((__m256i)(a), (__m256i)(b))
#define MOST_256(TYPE, a, b) (TYPE) _mm256_max_epi32((__m256i)(a), (__m256i)(b))
#define LEAST_UNSIGNED_256(TYPE, a, b) (TYPE) _mm256_min_epu32((__m256i)(a), (__m256i)(b))
DEFINE_SUMS_F32(sums_f32_32, AVX2, 4, WIDEN_256, LEAST_256, MOST_256, LEAST_UNSIGNED_256)

#define AVX512 TARGET("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
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

static void flush_f32(tally *t)
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

/* --- float64 ----------------------------------------------------------------------------------
 *
 * Mantissas of one exponent are added together, in 128 bits; 2^20 squares of 106 bits fit.
 */

INLINE void add_wide(wide *sum, uint64_t low, uint64_t high)
{
    uint64_t before = sum->low;
    sum->low = before + low;
    sum->high += high + (sum->low < before);
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

enum { HOLD64 = 1 << 20 }; /* squares of 106 bits that 128 bits hold */

INLINE uint64_t mantissa64(uint64_t bits)
{
    return (bits & 0xfffffffffffff) | ((bits << 1) >> 53 ? 0x10000000000000 : 0);
}

static void flush_f64(tally *t)
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

static void update_f64(tally *t, const uint8_t *data, size_t n, int mark)
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

/* --- integers of 32 and 64 bits ---------------------------------------------------------------
 *
 * The code of a magnitude: itself below 256, else its exponent and 7 bits below its first; with
 * the sign around 2^15, so that the codes stand in the order of the values.
 */

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

/* --- the vector unit, chosen when the module is loaded ---------------------------------------- */

typedef void update_function(tally *, const uint8_t *, size_t, int);

#define DEFINE_LEVEL(TARGET, NUMBER, SUMS_F32)                                                                         \
    TARGET static void update_f32_##NUMBER(tally *t, const uint8_t *data, size_t n, int mark)                          \
    {                                                                                                                  \
        update_f32(t, data, n, mark, SUMS_F32);                                                                        \
    }                                                                                                                  \
    TARGET static void update_i32_##NUMBER(tally *t, const uint8_t *data, size_t n, int mark)                          \
    {                                                                                                                  \
        update_i32(t, data, n, mark);                                                                                  \
    }                                                                                                                  \
    TARGET static void update_u32_##NUMBER(tally *t, const uint8_t *data, size_t n, int mark)                          \
    {                                                                                                                  \
        update_u32(t, data, n, mark);                                                                                  \
    }                                                                                                                  \
    TARGET static void update_i64_##NUMBER(tally *t, const uint8_t *data, size_t n, int mark)                          \
    {                                                                                                                  \
        update_i64(t, data, n, mark);                                                                                  \
    }                                                                                                                  \
    TARGET static void update_u64_##NUMBER(tally *t, const uint8_t *data, size_t n, int mark)                          \
    {                                                                                                                  \
        update_u64(t, data, n, mark);                                                                                  \
    }                                                                                                                  \
    static update_function *const updates_##NUMBER[KINDS] = {                                                          \
        update_p8, update_p16, update_f32_##NUMBER, update_f64, update_i32_##NUMBER, update_u32_##NUMBER,              \
        update_i64_##NUMBER, update_u64_##NUMBER,                                                                      \
    };

DEFINE_LEVEL(, 0, sums_f32_16)
#if X86
DEFINE_LEVEL(AVX2, 1, sums_f32_32)
DEFINE_LEVEL(AVX512, 2, sums_f32_64)
static update_function *const *const updates[] = {updates_0, updates_1, updates_2};
#else
static update_function *const *const updates[] = {updates_0};
#endif

static const char *const level_names[] = {"baseline", "AVX2", "AVX-512"};
static int best_level = 0, level = 0;

static int find_level(void)
{
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

static void update_tally(tally *t, int kind, const uint8_t *data, size_t n, int mark)
{
    updates[level][kind](t, data, n, mark);
    carry_all(t);
    t->everywhere |= !mark;
}

/* Collects the codes with a count into t->codes and t->counts, in order; clears every counter. */
static size_t collect(tally *t, int kind)
{
    size_t found = 0, groups = (kind == F64 ? CODES : SHORT) / GROUP, tables = kind == F64 ? 0 : SUBTABLES;
    uint64_t bytes[256];
    if (kind == P8)
        memcpy(bytes, t->tail, sizeof bytes);
    for (size_t g = 0; g < groups; g++) {
        size_t first = g * GROUP;
        if (!t->everywhere) {
            if (g % 8 == 0 && !load64(t->marks + g)) {
                g += 7;
                continue;
            }
            if (!t->marks[g])
                continue;
        }
        t->marks[g] = 0;
        uint64_t any = load64(t->low + first) | load64(t->low + first + 8);
        for (size_t c = first; c < first + GROUP; c++)
            any |= t->high[c];
        for (size_t j = 0; j < tables; j++)
            for (size_t c = first; c < first + GROUP; c++)
                any |= t->tables[j * STRIDE + c];
        if (!any)
            continue;
        for (size_t c = first; c < first + GROUP; c++) {
            uint64_t total = t->high[c] + t->low[c];
            for (size_t j = 0; j < tables; j++)
                total += t->tables[j * STRIDE + c];
            if (!total)
                continue;
            if (kind == P8) {
                bytes[c & 255] += total;
                bytes[c >> 8] += total;
            } else {
                t->codes[found] = (uint32_t)c;
                t->counts[found++] = total;
            }
        }
        memset(t->high + first, 0, GROUP * sizeof t->high[0]);
        memset(t->low + first, 0, GROUP);
        for (size_t j = 0; j < tables; j++)
            memset(t->tables + j * STRIDE + first, 0, GROUP * sizeof t->tables[0]);
    }
    if (kind == P8)
        for (uint32_t c = 0; c < 256; c++)
            if (bytes[c]) {
                t->codes[found] = c;
                t->counts[found++] = bytes[c];
            }
    return found;
}

/* --- Python ----------------------------------------------------------------------------------- */

static tally *tally_of(Py_buffer *view, int kind)
{
    if (kind < 0 || kind >= KINDS)
        PyErr_SetString(PyExc_ValueError, "no such kind of kernel");
    else if (view->len != (Py_ssize_t)sizeof(tally) || (uintptr_t)view->buf % 8)
        PyErr_SetString(PyExc_ValueError, "not a tally: it has another size, or is not aligned");
    else
        return view->buf;
    return NULL;
}

static PyObject *py_update(PyObject *self, PyObject *args)
{
    Py_buffer state, data;
    int kind, mark;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*iy*p", &state, &kind, &data, &mark))
        return NULL;
    tally *t = tally_of(&state, kind);
    if (t && data.len % item_size[kind]) {
        PyErr_SetString(PyExc_ValueError, "the data ends within an element");
    } else if (t) {
        size_t n = (size_t)data.len / (size_t)item_size[kind];
        if (data.len < 1 << 14) {
            /* shorter than a handover of the lock */
            update_tally(t, kind, data.buf, n, mark);
        } else {
            Py_BEGIN_ALLOW_THREADS
            update_tally(t, kind, data.buf, n, mark);
            Py_END_ALLOW_THREADS
        }
        result = Py_None;
        Py_INCREF(result);
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&state);
    return result;
}

static PyObject *limbs_to_bytes(int64_t *limbs, int n)
{
    uint32_t digits[SQUARE_LIMBS];
    carry(limbs, n);
    for (int i = 0; i < n; i++)
        digits[i] = (uint32_t)(uint64_t)limbs[i];
    return PyBytes_FromStringAndSize((const char *)digits, 4 * (Py_ssize_t)n);
}

static PyObject *py_finish(PyObject *self, PyObject *args)
{
    Py_buffer state;
    int kind;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*i", &state, &kind))
        return NULL;
    tally *t = tally_of(&state, kind);
    if (t) {
        size_t found;
        if (t->everywhere) {
            Py_BEGIN_ALLOW_THREADS
            found = collect(t, kind);
            Py_END_ALLOW_THREADS
        } else {
            found = collect(t, kind);
        }
        flush_f32(t);
        flush_f64(t);
        PyObject *codes = PyBytes_FromStringAndSize((const char *)t->codes, 4 * (Py_ssize_t)found);
        PyObject *counts = PyBytes_FromStringAndSize((const char *)t->counts, 8 * (Py_ssize_t)found);
        PyObject *sum = limbs_to_bytes(t->sum, SUM_LIMBS), *abs = limbs_to_bytes(t->abs, SUM_LIMBS);
        PyObject *square = limbs_to_bytes(t->square, SQUARE_LIMBS);
        if (codes && counts && sum && abs && square)
            result = Py_BuildValue("(OOKKKOKKOOO)", codes, counts, (unsigned long long)t->zeros,
                                   (unsigned long long)t->posinf, (unsigned long long)t->neginf,
                                   t->finite ? Py_True : Py_False, (unsigned long long)t->min_key,
                                   (unsigned long long)t->max_key, sum, abs, square);
        Py_XDECREF(codes);
        Py_XDECREF(counts);
        Py_XDECREF(sum);
        Py_XDECREF(abs);
        Py_XDECREF(square);
        memset(t, 0, offsetof(tally, marks));
    }
    PyBuffer_Release(&state);
    return result;
}

static PyObject *py_size(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return PyLong_FromSize_t(sizeof(tally));
}

static PyObject *py_levels(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i <= best_level; i++) {
        PyObject *name = PyUnicode_FromString(level_names[i]);
        if (!name || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_use(PyObject *self, PyObject *args)
{
    int wanted;
    (void)self;
    if (!PyArg_ParseTuple(args, "i", &wanted))
        return NULL;
    if (wanted < 0 || wanted > best_level) {
        PyErr_SetString(PyExc_ValueError, "this machine has no such vector unit");
        return NULL;
    }
    level = wanted;
    Py_INCREF(Py_None);
    return Py_None;
}

static PyMethodDef methods[] = {
    {"size", py_size, METH_NOARGS, "Bytes of a tally."},
    {"update", py_update, METH_VARARGS, "update(tally, kind, data, mark): counts the elements of data."},
    {"finish", py_finish, METH_VARARGS, "finish(tally, kind): the result; the tally is empty again."},
    {"levels", py_levels, METH_NOARGS, "Names of the vector units that can be used here, the best last."},
    {"use", py_use, METH_VARARGS, "use(i): use the vector unit levels()[i] from now on."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_kernels", "Kernels of the sketch; defined in kernels.py.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    best_level = level = find_level();
    return PyModule_Create(&module);
}
