/* The kernel of comparisons: what two runs of values of one type have in common.
 *
 * What it computes is defined in compare.py, in NumPy; nothing here may give another result. Values are
 * added up in groups of 64, in an order that is part of the definition, and the sums of groups are added
 * exactly: so neither the width of the vectors nor the way a tensor is cut into blocks can show.
 *
 * A comparison is one block of memory that the caller owns (`size()` bytes, zeros to begin with):
 *
 *   update(state, kind, unit, table, a, b)   compares; the global interpreter lock is released
 *   finish(state)                            gives the result and leaves the state as it was at the start
 *
 * and before there is a difference, `equal(a, b)` says that there is none in a block.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "values are compared as they lie in files, little-endian: other machines use the NumPy definition"
#endif

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "sums need IEEE doubles without excess precision: other machines use the NumPy definition"
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#define X86 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#else
#define X86 0
#endif

enum kind { P8, BF16, F16, F32, F64, I16, U16, I32, U32, I64, U64, KINDS };

static const size_t item_size[KINDS] = {1, 2, 2, 4, 8, 2, 2, 4, 4, 8, 8};

enum {
    GROUP = 64,   /* values that are added up in double */
    LANES = 8,    /* sums that run side by side within a group */
    SCALE = 600,  /* values of a group whose squares may be out of the range of double are multiplied by 2^±SCALE */
    LIMBS = 144,  /* 32 bits each: 2098 of a double, 4·SCALE, and room to grow */
    CARRY = 1024, /* groups after which limbs are carried; they have room for a million */
};

typedef struct {
    uint64_t changed;      /* units whose bytes differ */
    uint64_t nan_a, nan_b; /* NaN in one only */
    uint64_t max_integer;  /* greatest |b - a| of 64-bit integers */
    double max;            /* greatest |b - a| of other values */
    int64_t same[LIMBS];   /* squares where a group is equal in both */
    int64_t dd[LIMBS], aa[LIMBS], bb[LIMBS], ab[LIMBS];
} comparison;

/* --- exact sums of the groups' sums ------------------------------------------------------------- */

/* Adds x·2^shift, in units of 2^(-1074 - 2·SCALE). */
INLINE void add(int64_t *limbs, double x, int shift)
{
    uint64_t bits;
    memcpy(&bits, &x, 8);
    uint64_t mantissa = bits & 0xfffffffffffff;
    int exponent = (int)(bits >> 52) & 0x7ff;
    if (exponent)
        mantissa |= (uint64_t)1 << 52;
    int position = (exponent ? exponent - 1 : 0) + 2 * SCALE + shift;
    int k = position >> 5, s = position & 31;
    uint64_t low = (mantissa & 0xffffffff) << s, high = (mantissa >> 32) << s;
    int64_t sign = bits >> 63 ? -1 : 1;
    limbs[k] += sign * (int64_t)(low & 0xffffffff);
    limbs[k + 1] += sign * ((int64_t)(low >> 32) + (int64_t)(high & 0xffffffff));
    limbs[k + 2] += sign * (int64_t)(high >> 32);
}

static void carry(int64_t *limbs)
{
    for (int i = 0; i + 1 < LIMBS; i++) {
        uint64_t low = (uint64_t)limbs[i] & 0xffffffff;
        /* exact: what is left is a multiple of 2^32 */
        limbs[i + 1] += (limbs[i] - (int64_t)low) / 4294967296;
        limbs[i] = (int64_t)low;
    }
}

static void carry_all(comparison *s)
{
    carry(s->same);
    carry(s->dd);
    carry(s->aa);
    carry(s->bb);
    carry(s->ab);
}

/* --- one group ---------------------------------------------------------------------------------- */

typedef struct {
    double dd, aa, bb, ab, max;
} sums;

INLINE double total(const double *lanes)
{
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

#if defined(__GNUC__)
typedef double vector __attribute__((vector_size(8 * LANES)));
typedef int64_t vector_bits __attribute__((vector_size(8 * LANES)));

INLINE sums add_up(const double *a, const double *b, const double *d)
{
    vector dd = {0}, aa = {0}, bb = {0}, ab = {0}, max = {0};
    for (int i = 0; i < GROUP; i += LANES) {
        vector x, y, z;
        memcpy(&x, a + i, sizeof x);
        memcpy(&y, b + i, sizeof y);
        memcpy(&z, d + i, sizeof z);
        dd += z * z;
        aa += x * x;
        bb += y * y;
        ab += x * y;
        vector magnitude = (vector)((vector_bits)z & INT64_MAX);
        vector_bits more = magnitude > max;
        max = (vector)(((vector_bits)magnitude & more) | ((vector_bits)max & ~more));
    }
    sums s = {total((double *)&dd), total((double *)&aa), total((double *)&bb), total((double *)&ab), 0};
    for (int k = 0; k < LANES; k++)
        s.max = max[k] > s.max ? max[k] : s.max;
    return s;
}

INLINE double add_squares(const double *a)
{
    vector aa = {0};
    for (int i = 0; i < GROUP; i += LANES) {
        vector x;
        memcpy(&x, a + i, sizeof x);
        aa += x * x;
    }
    return total((double *)&aa);
}
#else
INLINE sums add_up(const double *a, const double *b, const double *d)
{
    double dd[LANES] = {0}, aa[LANES] = {0}, bb[LANES] = {0}, ab[LANES] = {0}, max = 0;
    for (int i = 0; i < GROUP; i += LANES)
        for (int k = 0; k < LANES; k++) {
            double x = a[i + k], y = b[i + k], z = d[i + k], magnitude = z < 0 ? -z : z;
            dd[k] += z * z;
            aa[k] += x * x;
            bb[k] += y * y;
            ab[k] += x * y;
            max = magnitude > max ? magnitude : max;
        }
    sums s = {total(dd), total(aa), total(bb), total(ab), max};
    return s;
}

INLINE double add_squares(const double *a)
{
    double aa[LANES] = {0};
    for (int i = 0; i < GROUP; i += LANES)
        for (int k = 0; k < LANES; k++)
            aa[k] += a[i + k] * a[i + k];
    return total(aa);
}
#endif

INLINE void subtract(const double *a, const double *b, double *d)
{
    for (int i = 0; i < GROUP; i++)
        d[i] = b[i] - a[i];
}

static double magnitude_of(double x)
{
    return x < 0 ? -x : x;
}

/* Multiplies values by a power of two that takes the greatest of their magnitudes near 1, if it is far from it.
 * Returns what takes the sum of their squares back. */
static int scale(double *values, double top)
{
    double by = top >= 0x1p500 ? 0x1p-600 : top < 0x1p-450 ? 0x1p600 : 1;
    for (int i = 0; i < GROUP; i++)
        values[i] *= by;
    return by < 1 ? 2 * SCALE : by > 1 ? -2 * SCALE : 0;
}

static double greatest(const double *values)
{
    double top = 0;
    for (int i = 0; i < GROUP; i++)
        top = magnitude_of(values[i]) > top ? magnitude_of(values[i]) : top;
    return top;
}

/* Leaves out what is not finite, and scales what is very large or very small; changes `a` and `b`. */
static void add_carefully(comparison *s, double *a, double *b)
{
    double d[GROUP];
    for (int i = 0; i < GROUP; i++) {
        int nan_a = a[i] != a[i], nan_b = b[i] != b[i];
        if (nan_a || nan_b || magnitude_of(a[i]) > DBL_MAX || magnitude_of(b[i]) > DBL_MAX) {
            s->nan_a += nan_a && !nan_b;
            s->nan_b += nan_b && !nan_a;
            if (!nan_a && !nan_b && a[i] != b[i])
                s->max = 2 * DBL_MAX;
            a[i] = b[i] = 0;
        }
    }
    double top_a = greatest(a), top_b = greatest(b);
    int huge = top_a >= 0x1p1022 || top_b >= 0x1p1022, shift_d = 2 * SCALE;
    for (int i = 0; i < GROUP && huge; i++) /* the difference itself may be out of range */
        d[i] = b[i] * 0x1p-600 - a[i] * 0x1p-600;
    for (int i = 0; i < GROUP; i++)
        s->max = magnitude_of(b[i] - a[i]) > s->max ? magnitude_of(b[i] - a[i]) : s->max;
    if (!huge) {
        subtract(a, b, d);
        shift_d = scale(d, greatest(d));
    }
    int shift_a = scale(a, top_a), shift_b = scale(b, top_b);
    sums g = add_up(a, b, d);
    add(s->dd, g.dd, shift_d);
    add(s->aa, g.aa, shift_a);
    add(s->bb, g.bb, shift_b);
    add(s->ab, g.ab, (shift_a + shift_b) / 2);
}

/* Whether a sum of squares lost nothing: none of them was out of the range of double. */
INLINE int in_range(const int kind, double squares)
{
    return squares < 0x1p900 && (kind != F64 || squares >= 0x1p-880);
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
    case I32: CONVERT(int32_t);
    case U32: CONVERT(uint32_t);
    case I64: CONVERT(int64_t);
    case U64: CONVERT(uint64_t);
    }
}

/* b - a of 64-bit integers, rounded once; gives the greatest magnitude. */
#define DEFINE_DISTANCE(NAME, TYPE)                                                                                    \
    static uint64_t NAME(const uint8_t *pa, const uint8_t *pb, double *d)                                              \
    {                                                                                                                  \
        uint64_t max = 0;                                                                                              \
        for (int i = 0; i < GROUP; i++) {                                                                              \
            TYPE x, y;                                                                                                 \
            memcpy(&x, pa + 8 * i, 8);                                                                                 \
            memcpy(&y, pb + 8 * i, 8);                                                                                 \
            uint64_t magnitude = y < x ? (uint64_t)x - (uint64_t)y : (uint64_t)y - (uint64_t)x;                        \
            d[i] = y < x ? -(double)magnitude : (double)magnitude;                                                     \
            max = magnitude > max ? magnitude : max;                                                                   \
        }                                                                                                              \
        return max;                                                                                                    \
    }

DEFINE_DISTANCE(distance_i64, int64_t)
DEFINE_DISTANCE(distance_u64, uint64_t)

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

/* Units that differ, of as many bytes as a value has, or of twice as many. */
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

INLINE void compare(comparison *s, const int kind, size_t unit, const double *table, const uint8_t *pa,
                    const uint8_t *pb, size_t n)
{
    const size_t size = item_size[kind];
    uint8_t last_a[8 * GROUP], last_b[8 * GROUP];
    double a[GROUP], b[GROUP], d[GROUP];
    for (size_t i = 0; i < n; i += GROUP, pa += GROUP * size, pb += GROUP * size) {
        size_t m = n - i < GROUP ? n - i : GROUP;
        if (m < GROUP) { /* what is missing is equal in both */
            memset(last_a, 0, sizeof last_a);
            memset(last_b, 0, sizeof last_b);
            memcpy(last_a, pa, m * size);
            memcpy(last_b, pb, m * size);
            pa = last_a;
            pb = last_b;
        }
        unsigned changed = unit == size ? count_changed(pa, pb, GROUP * size, size)
                                        : count_changed(pa, pb, GROUP * size, 2 * size);
        decode(kind, table, pa, a);
        for (size_t k = m; k < GROUP; k++) /* and is zero, which not every type has as its bits 0 */
            a[k] = 0;
        if (!changed) {
            double squares = add_squares(a);
            if (in_range(kind, squares)) {
                add(s->same, squares, 0);
            } else {
                memcpy(b, a, sizeof b);
                add_carefully(s, a, b);
            }
        } else {
            s->changed += changed;
            decode(kind, table, pb, b);
            for (size_t k = m; k < GROUP; k++)
                b[k] = 0;
            if (kind == I64 || kind == U64) {
                uint64_t max = kind == I64 ? distance_i64(pa, pb, d) : distance_u64(pa, pb, d);
                s->max_integer = max > s->max_integer ? max : s->max_integer;
            } else {
                subtract(a, b, d);
            }
            sums g = add_up(a, b, d);
            if (in_range(kind, g.aa) && in_range(kind, g.bb) && (in_range(kind, g.dd) || g.max == 0)) {
                s->max = g.max > s->max ? g.max : s->max;
                add(s->dd, g.dd, 0);
                add(s->aa, g.aa, 0);
                add(s->bb, g.bb, 0);
                add(s->ab, g.ab, 0);
            } else {
                add_carefully(s, a, b);
            }
        }
        if (i / GROUP % CARRY == CARRY - 1)
            carry_all(s);
    }
    carry_all(s);
}

/* --- the vector unit, chosen when the module is loaded -------------------------------------------- */

typedef void compare_function(comparison *, size_t, const double *, const uint8_t *, const uint8_t *, size_t);

#define DEFINE_COMPARE(TARGET, NUMBER, KIND)                                                                           \
    TARGET static void compare_##KIND##_##NUMBER(comparison *s, size_t unit, const double *table, const uint8_t *a,    \
                                                 const uint8_t *b, size_t n)                                           \
    {                                                                                                                  \
        compare(s, KIND, unit, table, a, b, n);                                                                        \
    }

#define DEFINE_LEVEL(TARGET, NUMBER)                                                                                   \
    DEFINE_COMPARE(TARGET, NUMBER, P8)                                                                                 \
    DEFINE_COMPARE(TARGET, NUMBER, BF16)                                                                               \
    DEFINE_COMPARE(TARGET, NUMBER, F16)                                                                                \
    DEFINE_COMPARE(TARGET, NUMBER, F32)                                                                                \
    DEFINE_COMPARE(TARGET, NUMBER, F64)                                                                                \
    DEFINE_COMPARE(TARGET, NUMBER, I16)                                                                                \
    DEFINE_COMPARE(TARGET, NUMBER, U16)                                                                                \
    DEFINE_COMPARE(TARGET, NUMBER, I32)                                                                                \
    DEFINE_COMPARE(TARGET, NUMBER, U32)                                                                                \
    DEFINE_COMPARE(TARGET, NUMBER, I64)                                                                                \
    DEFINE_COMPARE(TARGET, NUMBER, U64)                                                                                \
    static compare_function *const level_##NUMBER[KINDS] = {                                                           \
        compare_P8_##NUMBER,  compare_BF16_##NUMBER, compare_F16_##NUMBER, compare_F32_##NUMBER,                       \
        compare_F64_##NUMBER, compare_I16_##NUMBER,  compare_U16_##NUMBER, compare_I32_##NUMBER,                       \
        compare_U32_##NUMBER, compare_I64_##NUMBER,  compare_U64_##NUMBER,                                             \
    };

DEFINE_LEVEL(, 0)
#if X86
DEFINE_LEVEL(AVX2, 1)
DEFINE_LEVEL(AVX512, 2)
static compare_function *const *const comparers[] = {level_0, level_1, level_2};
#else
static compare_function *const *const comparers[] = {level_0};
#endif

static int best_level = 0, level = 0;

static int find_level(void)
{
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2"))
        return 1;
#endif
    return 0;
}

static void compare_block(comparison *s, int kind, size_t unit, const double *table, const uint8_t *a,
                          const uint8_t *b, size_t n)
{
#if X86
    /* A process may be set to take subnormal numbers for zero, and to round otherwise than to nearest. */
    unsigned control = _mm_getcsr();
    _mm_setcsr(0x1f80);
#endif
    comparers[level][kind](s, unit, table, a, b, n);
#if X86
    _mm_setcsr(control);
#endif
}

/* --- Python --------------------------------------------------------------------------------------- */

static comparison *state_of(const Py_buffer *view)
{
    if (view->len == (Py_ssize_t)sizeof(comparison) && (uintptr_t)view->buf % 8 == 0)
        return view->buf;
    PyErr_SetString(PyExc_ValueError, "not a comparison: it has another size, or is not aligned");
    return NULL;
}

static const char *wrong(int kind, Py_ssize_t unit, const Py_buffer *table, const Py_buffer *a, const Py_buffer *b)
{
    if (kind < 0 || kind >= KINDS)
        return "no such kind of values";
    Py_ssize_t size = (Py_ssize_t)item_size[kind];
    if (unit != size && unit != 2 * size)
        return "a unit is one value or two";
    if (kind == P8 && (table->len != 256 * (Py_ssize_t)sizeof(double) || (uintptr_t)table->buf % 8))
        return "the table has no 256 doubles";
    if (a->len != b->len)
        return "the blocks have different sizes";
    if (a->len % unit)
        return "the blocks end within an element";
    return NULL;
}

static PyObject *py_update(PyObject *self, PyObject *args)
{
    Py_buffer state, table, a, b;
    int kind;
    Py_ssize_t unit;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*iny*y*y*", &state, &kind, &unit, &table, &a, &b))
        return NULL;
    comparison *s = state_of(&state);
    if (s) {
        const char *message = wrong(kind, unit, &table, &a, &b);
        if (message) {
            PyErr_SetString(PyExc_ValueError, message);
        } else {
            size_t n = (size_t)a.len / item_size[kind];
            if (a.len < 1 << 13) {
                /* shorter than handing the lock over */
                compare_block(s, kind, (size_t)unit, table.buf, a.buf, b.buf, n);
            } else {
                Py_BEGIN_ALLOW_THREADS
                compare_block(s, kind, (size_t)unit, table.buf, a.buf, b.buf, n);
                Py_END_ALLOW_THREADS
            }
            result = Py_None;
            Py_INCREF(result);
        }
    }
    PyBuffer_Release(&b);
    PyBuffer_Release(&a);
    PyBuffer_Release(&table);
    PyBuffer_Release(&state);
    return result;
}

static PyObject *limbs_to_bytes(const int64_t *limbs)
{
    uint32_t digits[LIMBS];
    for (int i = 0; i < LIMBS; i++)
        digits[i] = (uint32_t)(uint64_t)limbs[i];
    return PyBytes_FromStringAndSize((const char *)digits, sizeof digits);
}

static PyObject *py_finish(PyObject *self, PyObject *args)
{
    Py_buffer state;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*", &state))
        return NULL;
    comparison *s = state_of(&state);
    if (s) {
        result = Py_BuildValue("(KKKKdNNNNN)", (unsigned long long)s->changed, (unsigned long long)s->nan_a,
                               (unsigned long long)s->nan_b, (unsigned long long)s->max_integer, s->max,
                               limbs_to_bytes(s->same), limbs_to_bytes(s->dd), limbs_to_bytes(s->aa),
                               limbs_to_bytes(s->bb), limbs_to_bytes(s->ab));
        memset(s, 0, sizeof *s);
    }
    PyBuffer_Release(&state);
    return result;
}

static PyObject *py_equal(PyObject *self, PyObject *args)
{
    Py_buffer a, b;
    int equal;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*", &a, &b))
        return NULL;
    if (a.len != b.len) {
        equal = 0;
    } else if (a.len < 1 << 14) {
        equal = memcmp(a.buf, b.buf, (size_t)a.len) == 0;
    } else {
        Py_BEGIN_ALLOW_THREADS
        equal = memcmp(a.buf, b.buf, (size_t)a.len) == 0;
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&b);
    PyBuffer_Release(&a);
    return PyBool_FromLong(equal);
}

static PyObject *py_size(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return PyLong_FromSize_t(sizeof(comparison));
}

static PyObject *py_levels(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return PyLong_FromLong(best_level + 1);
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
    {"size", py_size, METH_NOARGS, "Bytes of a comparison."},
    {"update", py_update, METH_VARARGS, "update(state, kind, unit, table, a, b): compares the values of two blocks."},
    {"finish", py_finish, METH_VARARGS, "finish(state): the result; the comparison is empty again."},
    {"equal", py_equal, METH_VARARGS, "equal(a, b): whether two blocks have the same bytes."},
    {"levels", py_levels, METH_NOARGS, "How many vector units can be used here."},
    {"use", py_use, METH_VARARGS, "use(i): use another vector unit from now on, the last being the best."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_compare", "The kernel of comparisons; defined in compare.py.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__compare(void)
{
    best_level = level = find_level();
    return PyModule_Create(&module);
}
