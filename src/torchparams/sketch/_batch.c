/* Statistics of many small tensors in one call, with a row of numbers for each tensor.
 *
 * Sketch and measure.tensor_stats.derive define every number, in NumPy and in Python's integers;
 * nothing here may give another bit. Sums are exact integers, and mean, norms and deviation are rounded once.
 *
 *   measure(state, data, starts, counts, form, table, quantiles, reals, integers, extremes)
 *
 * counts `counts[i]` values from the offset `starts[i]` of `data`, or from an address where `data` is None.
 */

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

static const size_t item_size[KINDS] = {1, 2, 4, 8, 4, 4, 8, 8};

enum {
    MOST = 1 << 16, /* maximum values of a tensor: so many squares of 106 bits fit in 128 */
    CODES = 1 << 19,
    NEAR = 28, /* exponents whose 2^16 squares of 48 bits fit in 128 bits together */
    LIMBS = 72, /* the square of a sum of float64 takes 68 */
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

/* --- natural numbers of many limbs --------------------------------------------------------------- */

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

/* --- rounding once ------------------------------------------------------------------------------- */

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

/* --- counting ------------------------------------------------------------------------------------ */

INLINE void count(state *t, uint32_t code)
{
    t->counts[code]++;
    t->used[code >> 6] |= (uint64_t)1 << (code & 63);
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

INLINE double value_of_f32(uint32_t bits)
{
    /* through integers: a process may be set to take subnormal numbers for zero */
    uint32_t e = bits >> 23 & 255, m = bits & 0x7fffff;
    double v = e ? from_bits((uint64_t)(e + 896) << 52 | (uint64_t)m << 29) : (double)m * 0x1p-149;
    return bits >> 31 ? -v : v;
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

/* --- numbers from counts --------------------------------------------------------------- */

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

/* --- Python -------------------------------------------------------------------------------------- */

enum { STATE, DATA, STARTS, TOTALS, TABLE, QUANTILES, OUT_REALS, OUT_INTEGERS, OUT_EXTREMES, BUFFERS };

static const char *wrong_with(const Py_buffer *b, const form *f)
{
    size_t n = (size_t)b[TOTALS].len / 8, wanted = (size_t)b[QUANTILES].len / 8;
    const uint64_t *starts = b[STARTS].buf, *totals = b[TOTALS].buf;
    if (f->kind < 0 || f->kind >= KINDS || f->order < ASCENDING || f->order > FLOATING)
        return "no such kind of values";
    if ((size_t)b[STATE].len != sizeof(state) || (uintptr_t)b[STATE].buf % 16)
        return "not a state: it has another size, or is not aligned";
    if ((size_t)b[STARTS].len != 8 * n || (size_t)b[OUT_REALS].len != 8 * n * (REALS + wanted)
        || (size_t)b[OUT_INTEGERS].len != 8 * n * INTEGERS || (size_t)b[OUT_EXTREMES].len != 8 * n * EXTREMES)
        return "the numbers of tensors differ";
    if (f->kind == F32 || f->kind == F64 ? b[TABLE].buf != NULL : (size_t)b[TABLE].len != (f->kind == P8 ? 256 : 1 << 16) * sizeof(double))
        return "the table does not have a value for each code";
    for (int k = 1; k < BUFFERS; k++)
        if (k != DATA && (uintptr_t)b[k].buf % 8)
            return "a buffer is not aligned";
    for (size_t i = 0; i < n; i++) {
        if (totals[i] > MOST)
            return "a tensor has too many values";
        size_t nbytes = totals[i] * item_size[f->kind];
        if (b[DATA].buf && (starts[i] > (uint64_t)b[DATA].len || nbytes > (uint64_t)b[DATA].len - starts[i]))
            return "a tensor ends behind the data";
    }
    return NULL;
}

static void measure(const Py_buffer *b, const form *f)
{
    size_t n = (size_t)b[TOTALS].len / 8, wanted = (size_t)b[QUANTILES].len / 8;
    const uint64_t *starts = b[STARTS].buf, *totals = b[TOTALS].buf;
    double *reals = b[OUT_REALS].buf;
    int64_t *integers = b[OUT_INTEGERS].buf;
    uint64_t *extremes = b[OUT_EXTREMES].buf;
    state *t = b[STATE].buf;
    for (size_t i = 0; i < n; i++) {
        const uint8_t *data = b[DATA].buf ? (const uint8_t *)b[DATA].buf + starts[i] : (const uint8_t *)(uintptr_t)starts[i];
        seen s = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
        scan(t, f, data, totals[i], &s);
        derive(t, f, s, totals[i], b[TABLE].buf, b[QUANTILES].buf, wanted, reals + i * (REALS + wanted),
               integers + i * INTEGERS, extremes + i * EXTREMES);
    }
}

static PyObject *py_measure(PyObject *self, PyObject *args)
{
    Py_buffer b[BUFFERS];
    form f;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*z*y*y*(iiid)z*y*w*w*w*", &b[STATE], &b[DATA], &b[STARTS], &b[TOTALS], &f.kind,
                          &f.order, &f.boolean, &f.largest, &b[TABLE], &b[QUANTILES], &b[OUT_REALS], &b[OUT_INTEGERS],
                          &b[OUT_EXTREMES]))
        return NULL;
    f.exact = f.kind == P8 || f.kind == P16;
    const char *wrong = wrong_with(b, &f);
    if (wrong) {
        PyErr_SetString(PyExc_ValueError, wrong);
    } else {
        Py_BEGIN_ALLOW_THREADS
        measure(b, &f);
        Py_END_ALLOW_THREADS
        result = Py_None;
        Py_INCREF(result);
    }
    for (int k = 0; k < BUFFERS; k++)
        PyBuffer_Release(&b[k]);
    return result;
}

static PyObject *py_sizes(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return Py_BuildValue("(niiiii)", (Py_ssize_t)sizeof(state), MOST, REALS, INTEGERS, EXTREMES, BINS);
}

static PyMethodDef methods[] = {
    {"measure", py_measure, METH_VARARGS,
     "measure(state, data, starts, counts, form, table, quantiles, reals, integers, extremes): fills the last three."},
    {"sizes", py_sizes, METH_NOARGS, "Bytes of a state, most values of a tensor, columns of the results, bins."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_batch", "Statistics of many small tensors; defined in batch.py.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__batch(void)
{
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2"))
        survey_best = survey_avx2;
#endif
    return PyModule_Create(&module);
}
