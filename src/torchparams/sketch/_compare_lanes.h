/* The kernels of comparisons for one vector unit. Each file that includes this defines
 *
 *   LEVEL  the name of its table
 *   FUSED  whether the unit multiplies and adds in one step
 *   PARTS  the vectors that 8 lanes take
 *
 * and compiles all of it for the unit: a call of code for another one would take longer than the work.
 */

#include "_compare.h"

/* --- exact sums -----------------------------------------------------------------------------------
 *
 * A sum is a fixed-point number of many 32-bit limbs, each in an int64 with 31 bits to spare, in units of
 * 2^-2148: the square of the least double.
 */

INLINE void add_bits(int64_t *limbs, int position, uint64_t value, int64_t sign)
{
    int k = position >> 5, s = position & 31;
    uint64_t low = (value & 0xffffffff) << s, high = (value >> 32) << s;
    limbs[k] += sign * (int64_t)(low & 0xffffffff);
    limbs[k + 1] += sign * ((int64_t)(low >> 32) + (int64_t)(high & 0xffffffff));
    limbs[k + 2] += sign * (int64_t)(high >> 32);
}

/* Mantissa of a finite double, and the position of its last bit above 2^-1074. */
INLINE uint64_t mantissa_of(double x, int *position)
{
    uint64_t bits;
    memcpy(&bits, &x, 8);
    int exponent = (int)(bits >> 52) & 0x7ff;
    *position = exponent ? exponent - 1 : 0;
    return (bits & 0xfffffffffffff) | (uint64_t)(exponent != 0) << 52;
}

static void add(int64_t *limbs, double x)
{
    int position;
    uint64_t mantissa = mantissa_of(x, &position);
    add_bits(limbs, position + 1074, mantissa, x < 0 ? -1 : 1);
}

static void carry(int64_t *limbs)
{
    for (int i = 0; i + 1 < LIMBS; i++) {
        uint64_t low = (uint64_t)limbs[i] & 0xffffffff;
        /* exact: the rest is a multiple of 2^32 */
        limbs[i + 1] += (limbs[i] - (int64_t)low) / 4294967296;
        limbs[i] = (int64_t)low;
    }
}

static void carry_all(comparison *s)
{
    carry(s->same);
    carry(s->aa);
    carry(s->bb);
    carry(s->ab);
}

/* Adds x·y, of any size. */
INLINE void add_product(int64_t *limbs, int position, uint64_t x, uint64_t y, int64_t sign)
{
    uint64_t xl = x & 0xffffffff, xh = x >> 32, yl = y & 0xffffffff, yh = y >> 32;
    uint64_t ll = xl * yl, lh = xl * yh, hl = xh * yl;
    uint64_t middle = (ll >> 32) + (lh & 0xffffffff) + (hl & 0xffffffff);
    add_bits(limbs, position, middle << 32 | (ll & 0xffffffff), sign);
    add_bits(limbs, position + 64, xh * yh + (lh >> 32) + (hl >> 32) + (middle >> 32), sign);
}

static void add_each(int64_t *limbs, const double *x, const double *y)
{
    for (int i = 0; i < GROUP; i++) {
        int p, q;
        uint64_t m = mantissa_of(x[i], &p), n = mantissa_of(y[i], &q);
        if (m && n)
            add_product(limbs, p + q, m, n, (x[i] < 0) == (y[i] < 0) ? 1 : -1);
    }
}

/* --- the sum of a group's products ----------------------------------------------------------------
 *
 * Let the products p of a group be below 2^H, and multiples of 2^W. If H - W is at most STEP, doubles add them without
 * an error: partial sums are multiples of 2^W of at most 53 bits. If not, a cascade of sums does it:
 *
 *   The first begins at 1.5·2^k, k = H + LOG - 1, and so stays between 2^k and 2^(k+1). Adding p rounds it to a
 *   multiple of 2^(k-52), and what is cut off is a double (Dekker 1971) of at most 2^(k-53), which goes into the next
 *   sum, which begins at 1.5·2^(k-STEP). The last begins at 0, and cuts off nothing if H - W is at most STEP for each
 *   sum of the cascade. What a sum has gained, in all lanes together, has at most 53 bits.
 *
 * A product that is not a double is the sum of two (Dekker and Veltkamp, 1971), p and what rounding cut off from it:
 * that goes into the second sum, and from there on there are two values for each.
 */

/* Magnitudes are below 2^top, and multiples of 2^low; mantissas have so many bits. */
typedef struct {
    int top, low, bits, special; /* special: some are not finite */
} range;

INLINE int greater(int a, int b)
{
    return a > b ? a : b;
}

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi" /* functions that return vectors are all inlined */
typedef double part __attribute__((vector_size(8 * LANES / PARTS)));
#define LANE(x, k) ((x).v[(k) / (LANES / PARTS)][(k) % (LANES / PARTS)])
#else
#undef PARTS
#define PARTS LANES
typedef double part;
#define LANE(x, k) ((x).v[k])
#endif
typedef struct {
    part v[PARTS];
} vector;
#define DEFINE_OPERATION(NAME, OPERATOR)                                                                               \
    INLINE vector NAME(vector x, vector y)                                                                             \
    {                                                                                                                  \
        for (int k = 0; k < PARTS; k++)                                                                                \
            x.v[k] = x.v[k] OPERATOR y.v[k];                                                                           \
        return x;                                                                                                      \
    }
DEFINE_OPERATION(ADD, +)
DEFINE_OPERATION(SUB, -)
DEFINE_OPERATION(MUL, *)

INLINE vector load(const double *p)
{
    vector v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vector all(double x)
{
    vector v;
    for (int k = 0; k < PARTS; k++)
        v.v[k] = x - (part){0};
    return v;
}

INLINE double total(vector v)
{
    return ((LANE(v, 0) + LANE(v, 4)) + (LANE(v, 2) + LANE(v, 6))) + ((LANE(v, 1) + LANE(v, 5)) + (LANE(v, 3) + LANE(v, 7)));
}

/* 1.5·2^exponent */
INLINE double above(int exponent)
{
    uint64_t bits = (uint64_t)(exponent + 1023) << 52 | (uint64_t)1 << 51;
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

/* sum += x; returns the rounding error. */
INLINE vector into(vector *sum, vector x)
{
    vector before = *sum;
    *sum = ADD(before, x);
    return SUB(x, SUB(*sum, before));
}

/* x·y + z, rounded once. */
INLINE vector fused_add(vector x, vector y, vector z)
{
    for (int k = 0; k < LANES; k++)
        LANE(z, k) = fma(LANE(x, k), LANE(y, k), LANE(z, k));
    return z;
}

/* sum += x·y, a double; returns the rounding error. `FUSED`: the processor multiplies and adds in one step. */
INLINE vector product_into(vector *sum, vector x, vector y)
{
    if (!FUSED)
        return into(sum, MUL(x, y));
    vector before = *sum;
    *sum = fused_add(x, y, before);
    return fused_add(x, y, SUB(before, *sum));
}

/* Rounding error of p = x·y. */
INLINE vector cut_off(vector x, vector y, vector p)
{
    if (FUSED)
        return fused_add(x, y, SUB(all(0), p));
    const vector by = all(0x1p27 + 1);
    vector xc = MUL(by, x), yc = MUL(by, y);
    vector xh = SUB(xc, SUB(xc, x)), yh = SUB(yc, SUB(yc, y));
    vector xl = SUB(x, xh), yl = SUB(y, yh);
    return ADD(ADD(ADD(SUB(MUL(xh, yh), p), MUL(xh, yl)), MUL(xl, yh)), MUL(xl, yl));
}

/* Sums of one kind of products: a cascade of `sums`, which begins as `first`. */
typedef struct {
    vector first[SUMS], s[SUMS];
} cascade;

INLINE void begin(const int sums, cascade *c, int top)
{
    for (int k = 0; k < sums; k++)
        c->s[k] = c->first[k] = all(k + 1 < sums ? above(top + LOG - 1 - STEP * k) : 0);
}

INLINE void step(const int sums, const int pairs, cascade *c, vector x, vector y)
{
    vector *s = c->s;
    if (sums == 1) {
        s[0] = ADD(s[0], MUL(x, y));
        return;
    }
    vector p = MUL(x, y);
    vector rest = pairs ? into(&s[0], p) : product_into(&s[0], x, y);
    vector more = pairs ? cut_off(x, y, p) : p;
    for (int k = 1; k + 1 < sums; k++) {
        rest = into(&s[k], rest);
        if (pairs)
            more = into(&s[k], more);
    }
    s[sums - 1] = ADD(s[sums - 1], pairs ? ADD(rest, more) : rest);
}

INLINE void end(const int sums, const cascade *c, int64_t *limbs)
{
    for (int k = 0; k < sums; k++)
        add(limbs, total(SUB(c->s[k], c->first[k])));
}

INLINE void add_products(const int sums, const int pairs, int64_t *limbs, const double *x,
                         const double *y, int top)
{
    cascade c;
    begin(sums, &c, top);
    for (int i = 0; i < GROUP; i += LANES)
        step(sums, pairs, &c, load(x + i), load(y + i));
    end(sums, &c, limbs);
}

/* Adds the products of two groups: of each with itself, and with the other; or the squares of one. */
INLINE void add_with(const int sums, const int pairs, int64_t *aa, int64_t *bb, int64_t *ab,
                     const double *a, const double *b, int top_a, int top_b)
{
    if (!b || sums > 2 || pairs) { /* more sums at once than there are registers */
        add_products(sums, pairs, aa, a, a, 2 * top_a);
        if (b) {
            add_products(sums, pairs, bb, b, b, 2 * top_b);
            add_products(sums, pairs, ab, a, b, top_a + top_b);
        }
        return;
    }
    cascade of_aa, of_bb, of_ab;
    begin(sums, &of_aa, 2 * top_a);
    begin(sums, &of_bb, 2 * top_b);
    begin(sums, &of_ab, top_a + top_b);
    for (int i = 0; i < GROUP; i += LANES) {
        vector x = load(a + i), y = load(b + i);
        step(sums, pairs, &of_aa, x, x);
        step(sums, pairs, &of_bb, y, y);
        step(sums, pairs, &of_ab, x, y);
    }
    end(sums, &of_aa, aa);
    end(sums, &of_bb, bb);
    end(sums, &of_ab, ab);
}

INLINE void add_group(int64_t *aa, int64_t *bb, int64_t *ab, const double *a, const double *b, const range *of_a,
                      const range *of_b)
{
    int width = 2 * greater(of_a->top - of_a->low, of_b->top - of_b->low);
    int pairs = 2 * greater(of_a->bits, of_b->bits) > 53;
    int far = greater(greater(of_a->top, of_b->top), -(of_a->low < of_b->low ? of_a->low : of_b->low));
    int sums = far > 400 ? SUMS + 1 : (width + STEP - 1) / STEP;
#define WITH(SUMS, PAIRS) add_with(SUMS, PAIRS, aa, bb, ab, a, b, of_a->top, of_b->top)
    if (sums > SUMS) {
        add_each(aa, a, a);
        if (b) {
            add_each(bb, b, b);
            add_each(ab, a, b);
        }
    } else if (pairs) {
        if (sums <= 3)
            WITH(3, 1);
        else if (sums == 4)
            WITH(4, 1);
        else
            WITH(SUMS, 1);
    } else if (sums <= 1) {
        WITH(1, 0);
    } else if (sums == 2) {
        WITH(2, 0);
    } else if (sums == 3) {
        WITH(3, 0);
    } else {
        WITH(SUMS, 0);
    }
}

/* Maximum |b - a| of finite values, or `max` if that is greater. */
INLINE double greatest(const double *a, const double *b, double max)
{
    int64_t most; /* magnitudes are ordered as their bits are */
    memcpy(&most, &max, 8);
    for (int i = 0; i < GROUP; i++) {
        double d = b[i] - a[i];
        int64_t bits;
        memcpy(&bits, &d, 8);
        bits &= INT64_MAX;
        most = bits > most ? bits : most;
    }
    memcpy(&max, &most, 8);
    return max;
}

/* --- the range of a group ------------------------------------------------------------------------- */

/* Of floats as their bits: MANTISSA bits of mantissa behind the first, MAGNITUDE all bits but the sign. */
#define DEFINE_RANGE(NAME, TYPE, MAGNITUDE, MANTISSA, BIAS)                                                            \
    INLINE range NAME(const uint8_t *p)                                                                                \
    {                                                                                                                  \
        TYPE most = 0, least = (TYPE)-1, set = 0; /* least: of those that are not 0, less 1 */                         \
        for (int i = 0; i < GROUP; i++) {                                                                              \
            TYPE v;                                                                                                    \
            memcpy(&v, p + i * sizeof v, sizeof v);                                                                    \
            v = (TYPE)(v & (TYPE)(MAGNITUDE));                                                                         \
            TYPE less = (TYPE)(v - 1);                                                                                 \
            most = v > most ? v : most;                                                                                \
            least = less < least ? less : least;                                                                       \
            if (MANTISSA == 52)                                                                                        \
                set = (TYPE)(set | v);                                                                                 \
        }                                                                                                              \
        range r = {0, 0, MANTISSA + 1, 0};                                                                             \
        if (!most)                                                                                                     \
            return r;                                                                                                  \
        int last = (int)(most >> MANTISSA), first = (int)((TYPE)(least + 1) >> MANTISSA);                              \
        r.special = last == (int)((TYPE)(MAGNITUDE) >> MANTISSA);                                                      \
        r.top = (last ? last : 1) - BIAS + 1;                                                                          \
        r.low = (first ? first : 1) - BIAS - MANTISSA;                                                                 \
        if (MANTISSA == 52) /* bits at the end that none has: values of a narrower type */                             \
            while (r.bits > 1 && !(set & 1)) {                                                                         \
                set = (TYPE)(set >> 1);                                                                                \
                r.low++;                                                                                               \
                r.bits--;                                                                                              \
            }                                                                                                          \
        return r;                                                                                                      \
    }

DEFINE_RANGE(range_bf16, uint16_t, 0x7fff, 7, 127)
DEFINE_RANGE(range_f16, uint16_t, 0x7fff, 10, 15)
DEFINE_RANGE(range_f32, uint32_t, 0x7fffffff, 23, 127)
DEFINE_RANGE(range_f64, uint64_t, 0x7fffffffffffffff, 52, 1023)

/* Of the finite values of a table; `special` if there are others. */
static range range_of_table(const double *table)
{
    double finite[GROUP];
    int special = 0;
    for (int i = 0; i < GROUP; i++) {
        special |= table[i] - table[i] != 0;
        finite[i] = table[i] - table[i] == 0 ? table[i] : 0;
    }
    range r = range_f64((const uint8_t *)finite);
    r.special = special;
    return r;
}

INLINE int any_special(const double *values)
{
    vector sum = all(0);
    for (int i = 0; i < GROUP; i += LANES)
        sum = ADD(sum, SUB(load(values + i), load(values + i)));
    return total(sum) != 0;
}

INLINE range range_of(const int kind, const range *of_table, const uint8_t *p, const double *decoded)
{
    range r = *of_table;
    static const range narrow = {16, 0, 16, 0};
    switch (kind) {
    case P8:
        if (2 * (r.top - r.low) > 2 * STEP)
            return range_f64((const uint8_t *)decoded);
        r.special = r.special && any_special(decoded);
        return r;
    case BF16: return range_bf16(p);
    case F16: return range_f16(p);
    case F32: return range_f32(p);
    case I16:
    case U16: return narrow;
    default: return range_f64((const uint8_t *)decoded);
    }
}

static double magnitude_of(double x)
{
    return x < 0 ? -x : x;
}

/* Counts values that are not finite in one or both, and replaces them by zeros. */
static void leave_out(comparison *s, double *a, double *b)
{
    for (int i = 0; i < GROUP; i++) {
        int nan_a = a[i] != a[i], nan_b = b[i] != b[i];
        if (nan_a || nan_b || magnitude_of(a[i]) > DBL_MAX || magnitude_of(b[i]) > DBL_MAX) {
            s->nan_a += nan_a && !nan_b;
            s->nan_b += nan_b && !nan_a;
            s->infinite += !nan_a && !nan_b && a[i] != b[i];
            a[i] = b[i] = 0;
        }
    }
}

#define LOAD(TYPE)                                                                                                     \
    TYPE v;                                                                                                            \
    memcpy(&v, p + i * sizeof v, sizeof v)

#define CONVERT(TYPE)                                                                                                  \
    for (int i = 0; i < GROUP; i++) {                                                                                  \
        LOAD(TYPE);                                                                                                    \
        out[i] = (double)v;                                                                                            \
    }                                                                                                                  \
    break

INLINE double of_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE void decode(const int kind, const double *table, const uint8_t *p, double *out)
{
    switch (kind) {
    case P8:
        for (int i = 0; i < GROUP; i++)
            out[i] = table[p[i]];
        break;
    case BF16:
        for (int i = 0; i < GROUP; i++) {
            LOAD(uint16_t);
            out[i] = of_bits((uint32_t)v << 16);
        }
        break;
    case F16:
        for (int i = 0; i < GROUP; i++) {
            LOAD(uint16_t);
            /* Without a branch, and without a subnormal float, on which processors take their time. */
            uint32_t magnitude = v & 0x7fff;
            uint32_t tiny = 0u - (magnitude < 0x400), special = 0u - (magnitude >= 0x7c00);
            float scaled = (float)(int32_t)magnitude * 0x1p-24f;
            uint32_t bits;
            memcpy(&bits, &scaled, 4);
            bits = (bits & tiny) | (((magnitude << 13) + (112 << 23)) & ~tiny) | (special & 0x7f800000);
            out[i] = of_bits(bits | (uint32_t)(v & 0x8000) << 16);
        }
        break;
    case F32: CONVERT(float);
    case F64: memcpy(out, p, GROUP * sizeof *out); break;
    case I16: CONVERT(int16_t);
    case U16: CONVERT(uint16_t);
    }
}

/* --- wide integers --------------------------------------------------------------------------------
 *
 * Their products are added up in columns of 32 bits, the sign in the last.
 */

#define DEFINE_INTEGERS(TYPE, WIDE)                                                                                    \
    /* The greatest |b - a|. */                                                                                        \
    INLINE uint64_t distance_##TYPE(const uint8_t *pa, const uint8_t *pb, uint64_t max)                                \
    {                                                                                                                  \
        for (int i = 0; i < GROUP; i++) {                                                                              \
            TYPE x, y;                                                                                                 \
            memcpy(&x, pa + i * sizeof x, sizeof x);                                                                   \
            memcpy(&y, pb + i * sizeof y, sizeof y);                                                                   \
            uint64_t distance = y < x ? (uint64_t)x - (uint64_t)y : (uint64_t)y - (uint64_t)x;                         \
            max = distance > max ? distance : max;                                                                     \
        }                                                                                                              \
        return max;                                                                                                    \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void add_##TYPE(int64_t *limbs, const uint8_t *px, const uint8_t *py)                                       \
    {                                                                                                                  \
        const WIDE mask = 0xffffffff;                                                                                  \
        WIDE c0 = 0, c1 = 0, c2 = 0, c3 = 0;                                                                           \
        for (int i = 0; i < GROUP; i++) {                                                                              \
            TYPE x, y;                                                                                                 \
            memcpy(&x, px + i * sizeof x, sizeof x);                                                                   \
            memcpy(&y, py + i * sizeof y, sizeof y);                                                                   \
            if (sizeof(TYPE) == 4) {                                                                                   \
                WIDE p = (WIDE)x * (WIDE)y;                                                                            \
                c0 += p & mask;                                                                                        \
                c1 += p >> 32;                                                                                         \
            } else {                                                                                                   \
                uint64_t xl = (uint64_t)x & 0xffffffff, yl = (uint64_t)y & 0xffffffff, ll = xl * yl;                   \
                WIDE xh = (WIDE)x >> (sizeof(TYPE) * 4), yh = (WIDE)y >> (sizeof(TYPE) * 4);                           \
                WIDE lh = (WIDE)xl * yh, hl = xh * (WIDE)yl, hh = xh * yh;                                             \
                c0 += (WIDE)(ll & 0xffffffff);                                                                         \
                c1 += (WIDE)(ll >> 32) + (lh & mask) + (hl & mask);                                                    \
                c2 += (lh >> 32) + (hl >> 32) + (hh & mask);                                                           \
                c3 += hh >> 32;                                                                                        \
            }                                                                                                          \
        }                                                                                                              \
        WIDE columns[4] = {c0, c1, c2, c3};                                                                            \
        for (int k = 0; k < 4; k++) {                                                                                  \
            WIDE c = columns[k];                                                                                       \
            add_bits(limbs, 2 * 1074 + 32 * k, c < 0 ? 0 - (uint64_t)c : (uint64_t)c, c < 0 ? -1 : 1);                 \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    INLINE void compare_##TYPE(comparison *s, const uint8_t *pa, const uint8_t *pb, int changed)                       \
    {                                                                                                                  \
        add_##TYPE(changed ? s->aa : s->same, pa, pa);                                                                 \
        if (changed) {                                                                                                 \
            s->max_integer = distance_##TYPE(pa, pb, s->max_integer);                                                  \
            add_##TYPE(s->bb, pb, pb);                                                                                 \
            add_##TYPE(s->ab, pa, pb);                                                                                 \
        }                                                                                                              \
    }

DEFINE_INTEGERS(int32_t, int64_t)
DEFINE_INTEGERS(uint32_t, uint64_t)
DEFINE_INTEGERS(int64_t, int64_t)
DEFINE_INTEGERS(uint64_t, uint64_t)

/* --- counts of changes --------------------------------------------------------------------------- */

#define COUNT(TYPE)                                                                                                    \
    {                                                                                                                  \
        unsigned changed = 0;                                                                                          \
        for (size_t i = 0; i < nbytes / sizeof(TYPE); i++) {                                                           \
            TYPE x, y;                                                                                                 \
            memcpy(&x, a + i * sizeof x, sizeof x);                                                                    \
            memcpy(&y, b + i * sizeof y, sizeof y);                                                                    \
            changed += x != y;                                                                                         \
        }                                                                                                              \
        return changed;                                                                                                \
    }

/* Number of units that differ; a unit is one value, or two. */
INLINE unsigned count_changed(const uint8_t *a, const uint8_t *b, const size_t nbytes, size_t unit)
{
    switch (unit) {
    case 1: COUNT(uint8_t)
    case 2: COUNT(uint16_t)
    case 4: COUNT(uint32_t)
    case 8: COUNT(uint64_t)
    default: {
        unsigned changed = 0;
        for (size_t i = 0; i < nbytes; i += 16)
            changed += memcmp(a + i, b + i, 16) != 0;
        return changed;
    }
    }
}

/* --- a block -------------------------------------------------------------------------------------- */

INLINE void load_group(const int kind, const double *table, const range *of_table, const uint8_t *p, size_t n, double *out, range *of)
{
    decode(kind, table, p, out);
    for (size_t k = n; k < GROUP; k++) /* zero, which not every type has as its bits 0 */
        out[k] = 0;
    *of = range_of(kind, of_table, p, out);
}

INLINE void compare_floats(comparison *s, const int kind, const double *table, const range *of_table, const uint8_t *pa, const uint8_t *pb,
                           size_t n, int changed)
{
    double a[GROUP], b[GROUP];
    range of_a, of_b;
    load_group(kind, table, of_table, pa, n, a, &of_a);
    if (!changed && !of_a.special) {
        add_group(s->same, NULL, NULL, a, NULL, &of_a, &of_a);
        return;
    }
    load_group(kind, table, of_table, pb, n, b, &of_b);
    if (of_a.special || of_b.special) {
        leave_out(s, a, b);
        of_a = range_f64((const uint8_t *)a);
        of_b = range_f64((const uint8_t *)b);
    }
    s->max = greatest(a, b, s->max);
    add_group(s->aa, s->bb, s->ab, a, b, &of_a, &of_b);
}

INLINE void compare(comparison *s, const int kind, size_t unit, const double *table, const uint8_t *pa,
                    const uint8_t *pb, size_t n)
{
    const size_t size = item_size[kind];
    uint8_t last_a[8 * GROUP], last_b[8 * GROUP];
    range of_table = {0, 0, 0, 0};
    if (kind == P8)
        of_table = range_of_table(table);
    for (size_t i = 0; i < n; i += GROUP, pa += GROUP * size, pb += GROUP * size) {
        size_t m = n - i < GROUP ? n - i : GROUP;
        if (m < GROUP) { /* missing values are equal in both */
            memset(last_a, 0, sizeof last_a);
            memset(last_b, 0, sizeof last_b);
            memcpy(last_a, pa, m * size);
            memcpy(last_b, pb, m * size);
            pa = last_a;
            pb = last_b;
        }
        unsigned changed = unit == size ? count_changed(pa, pb, GROUP * size, size)
                                        : count_changed(pa, pb, GROUP * size, 2 * size);
        s->changed += changed;
        switch (kind) {
        case I32: compare_int32_t(s, pa, pb, changed != 0); break;
        case U32: compare_uint32_t(s, pa, pb, changed != 0); break;
        case I64: compare_int64_t(s, pa, pb, changed != 0); break;
        case U64: compare_uint64_t(s, pa, pb, changed != 0); break;
        default: compare_floats(s, kind, table, &of_table, pa, pb, m, changed != 0);
        }
        if (i / GROUP % CARRY == CARRY - 1)
            carry_all(s);
    }
    carry_all(s);
}

/* --- the table ------------------------------------------------------------------------------------ */

#define DEFINE_COMPARE(KIND)                                                                                           \
    static void compare_##KIND(comparison *s, size_t unit, const double *table, const uint8_t *a, const uint8_t *b,    \
                               size_t n)                                                                               \
    {                                                                                                                  \
        compare(s, KIND, unit, table, a, b, n);                                                                        \
    }

DEFINE_COMPARE(P8)
DEFINE_COMPARE(BF16)
DEFINE_COMPARE(F16)
DEFINE_COMPARE(F32)
DEFINE_COMPARE(F64)
DEFINE_COMPARE(I16)
DEFINE_COMPARE(U16)
DEFINE_COMPARE(I32)
DEFINE_COMPARE(U32)
DEFINE_COMPARE(I64)
DEFINE_COMPARE(U64)

compare_function *const LEVEL[KINDS] = {
    compare_P8,  compare_BF16, compare_F16, compare_F32, compare_F64, compare_I16,
    compare_U16, compare_I32,  compare_U32, compare_I64, compare_U64,
};
