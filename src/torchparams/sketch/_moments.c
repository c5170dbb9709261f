/* Sums of many tensors that lie in memory, a row of numbers for each: what a record of a training step is made of.
 *
 * What is computed is defined in moments.py, in NumPy. Counts and maxima are the same there. Sums are float64, added up
 * in another order: the last bits may differ.
 *
 *   measure(kind, addresses, counts, sums, integers, exponents)
 *   distance(kind, addresses, others, counts, sums)
 *   nonfinite(kind, addresses, counts, found)
 *
 * All release the global interpreter lock. Whoever calls keeps the memory alive.
 */

#include "_common.h"

#if X86
#define AVX2 TARGET("avx2,fma")
#endif

enum kind { F32, F64, BF16, F16, KINDS };

static const size_t item_size[KINDS] = {4, 8, 2, 2};

enum {
    CHUNK = 2048,    /* values that stay in the first-level cache, as float64 */
    LANES = 16,      /* partial sums */
    EXPONENTS = 256, /* of float32; those of float64 beyond them count at the ends */
    SUMS = 3,        /* sum, sum of squares, greatest magnitude: of finite values */
    INTEGERS = 2,    /* zeros, values that are not finite */
};

typedef struct {
    double sum[LANES], squares[LANES], most;
    int64_t zeros, odd;
    int64_t *exponents; /* NULL where they are not wanted */
} row;

/* --- values as float32 or float64 ------------------------------------------------------------------ */

INLINE float half(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023, out;
    float value;
    if (exponent == 0) { /* zero, or a fraction of 2^-14 */
        value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    out = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    memcpy(&value, &out, 4);
    return value;
}

INLINE void widen(int kind, const uint8_t *data, size_t n, float *out)
{
    if (kind == BF16) {
        for (size_t i = 0; i < n; i++) {
            uint16_t bits;
            memcpy(&bits, data + 2 * i, 2);
            uint32_t wide = (uint32_t)bits << 16;
            memcpy(out + i, &wide, 4);
        }
    } else if (kind == F16) {
        for (size_t i = 0; i < n; i++) {
            uint16_t bits;
            memcpy(&bits, data + 2 * i, 2);
            out[i] = half(bits);
        }
    } else {
        memcpy(out, data, 4 * n);
    }
}

/* --- a chunk ---------------------------------------------------------------------------------------- */

/* Sums of finite values; they are kept in registers, for memory might be that of the values. */
#define ADD(NAME, TYPE)                                                                                                \
    INLINE void NAME(row *to, const TYPE *x, size_t n)                                                                 \
    {                                                                                                                  \
        double sum[LANES], squares[LANES];                                                                             \
        memcpy(sum, to->sum, sizeof sum);                                                                              \
        memcpy(squares, to->squares, sizeof squares);                                                                  \
        size_t i = 0;                                                                                                  \
        for (; i + LANES <= n; i += LANES)                                                                             \
            for (size_t l = 0; l < LANES; l++) {                                                                       \
                double value = x[i + l];                                                                               \
                sum[l] += value;                                                                                       \
                squares[l] += value * value;                                                                           \
            }                                                                                                          \
        for (; i < n; i++) {                                                                                           \
            double value = x[i];                                                                                       \
            sum[0] += value;                                                                                           \
            squares[0] += value * value;                                                                               \
        }                                                                                                              \
        memcpy(to->sum, sum, sizeof sum);                                                                              \
        memcpy(to->squares, squares, sizeof squares);                                                                  \
    }

ADD(add_f32, float)
ADD(add_f64, double)

typedef union {
    float value[CHUNK];
    int32_t bits[CHUNK];
} chunk;

INLINE void chunk_f32(row *to, chunk *x, size_t n)
{
    int32_t most = 0, zeros = 0, odd = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t bits = x->bits[i] & 0x7fffffff;
        int32_t finite = bits < 0x7f800000 ? bits : 0;
        most = finite > most ? finite : most;
        zeros += bits == 0;
        odd += bits >= 0x7f800000;
    }
    if (to->exponents && n < CHUNK / 4) {
        for (size_t i = 0; i < n; i++)
            to->exponents[x->bits[i] >> 23 & 255]++;
    } else if (to->exponents) {
        uint32_t counts[4][EXPONENTS] = {{0}}; /* four, since equal neighbours would wait for each other */
        size_t i = 0;
        for (; i + 4 <= n; i += 4)
            for (int l = 0; l < 4; l++)
                counts[l][x->bits[i + l] >> 23 & 255]++;
        for (; i < n; i++)
            counts[0][x->bits[i] >> 23 & 255]++;
        for (int e = 0; e < EXPONENTS; e++)
            to->exponents[e] += counts[0][e] + counts[1][e] + counts[2][e] + counts[3][e];
    }
    if (odd)
        for (size_t i = 0; i < n; i++)
            x->bits[i] = (x->bits[i] & 0x7fffffff) < 0x7f800000 ? x->bits[i] : 0;
    add_f32(to, x->value, n);
    float value;
    memcpy(&value, &most, 4);
    to->most = value > to->most ? value : to->most;
    to->zeros += zeros;
    to->odd += odd;
}

INLINE void chunk_f64(row *to, const double *x, size_t n)
{
    uint64_t most = 0;
    int64_t zeros = 0, odd = 0;
    double wide[CHUNK];
    for (size_t i = 0; i < n; i++) {
        uint64_t bits;
        memcpy(&bits, x + i, 8);
        bits &= 0x7fffffffffffffffull;
        uint64_t finite = bits < 0x7ff0000000000000ull ? bits : 0;
        most = finite > most ? finite : most;
        zeros += bits == 0;
        odd += bits >= 0x7ff0000000000000ull;
        wide[i] = bits < 0x7ff0000000000000ull ? x[i] : 0;
        if (to->exponents) {
            int64_t e = (int64_t)(bits >> 52) - 1023 + 127;
            to->exponents[bits == 0 ? 0 : bits >= 0x7ff0000000000000ull ? 255 : e < 0 ? 0 : e > 254 ? 254 : e]++;
        }
    }
    add_f64(to, wide, n);
    double value;
    memcpy(&value, &most, 8);
    to->most = value > to->most ? value : to->most;
    to->zeros += zeros;
    to->odd += odd;
}

INLINE void body(row *to, int kind, const uint8_t *data, size_t n)
{
    chunk values;
    double wide[CHUNK];
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t count = n - at < CHUNK ? n - at : CHUNK;
        const uint8_t *here = data + at * item_size[kind];
        if (kind == F64) {
            memcpy(wide, here, 8 * count);
            chunk_f64(to, wide, count);
        } else {
            widen(kind, here, count, values.value);
            chunk_f32(to, &values, count);
        }
    }
}

/* Adds the squares of a difference, and of its second term; kept in registers. */
#define APART(NAME, TYPE)                                                                                              \
    INLINE void NAME(const TYPE *x, const TYPE *y, size_t n, double *all, double *all_base)                            \
    {                                                                                                                  \
        double sum[LANES], base[LANES];                                                                                \
        memcpy(sum, all, sizeof sum);                                                                                  \
        memcpy(base, all_base, sizeof base);                                                                           \
        size_t i = 0;                                                                                                  \
        for (; i + LANES <= n; i += LANES)                                                                             \
            for (size_t l = 0; l < LANES; l++) {                                                                       \
                double v = y[i + l], d = (double)x[i + l] - v;                                                         \
                sum[l] += d * d;                                                                                       \
                base[l] += v * v;                                                                                      \
            }                                                                                                          \
        for (; i < n; i++) {                                                                                           \
            double v = y[i], d = (double)x[i] - v;                                                                     \
            sum[0] += d * d;                                                                                           \
            base[0] += v * v;                                                                                          \
        }                                                                                                              \
        memcpy(all, sum, sizeof sum);                                                                                  \
        memcpy(all_base, base, sizeof base);                                                                           \
    }

APART(apart_f32, float)
APART(apart_f64, double)

/* The sums of squares of a difference and of its second term, in float64; not finite where an element is not. */
INLINE void apart_body(int kind, const uint8_t *a, const uint8_t *b, size_t n, double *found)
{
    double sum[LANES] = {0}, base[LANES] = {0};
    if (kind == F32) {
        apart_f32((const float *)(const void *)a, (const float *)(const void *)b, n, sum, base);
    } else if (kind == F64) {
        apart_f64((const double *)(const void *)a, (const double *)(const void *)b, n, sum, base);
    } else {
        float x[CHUNK], y[CHUNK];
        for (size_t at = 0; at < n; at += CHUNK) {
            size_t count = n - at < CHUNK ? n - at : CHUNK;
            widen(kind, a + 2 * at, count, x);
            widen(kind, b + 2 * at, count, y);
            apart_f32(x, y, count, sum, base);
        }
    }
    found[0] = found[1] = 0;
    for (int l = 0; l < LANES; l++) {
        found[0] += sum[l];
        found[1] += base[l];
    }
}

INLINE int64_t odd_body(int kind, const uint8_t *data, size_t n)
{
    int64_t odd = 0;
    if (kind == F64) {
        for (size_t i = 0; i < n; i++) {
            uint64_t bits;
            memcpy(&bits, data + 8 * i, 8);
            odd += (bits & 0x7fffffffffffffffull) >= 0x7ff0000000000000ull;
        }
    } else if (kind == F32) {
        for (size_t at = 0; at < n; at += 1 << 20) {
            size_t stop = n - at < 1 << 20 ? n : at + (1 << 20);
            uint32_t some = 0;
            for (size_t i = at; i < stop; i++) {
                uint32_t bits;
                memcpy(&bits, data + 4 * i, 4);
                some += (bits & 0x7fffffffu) >= 0x7f800000u;
            }
            odd += some;
        }
    } else {
        uint16_t mask = 0x7fff, least = kind == BF16 ? 0x7f80 : 0x7c00;
        for (size_t at = 0; at < n; at += 1 << 15) {
            size_t stop = n - at < 1 << 15 ? n : at + (1 << 15);
            uint16_t some = 0;
            for (size_t i = at; i < stop; i++) {
                uint16_t bits;
                memcpy(&bits, data + 2 * i, 2);
                some += (bits & mask) >= least;
            }
            odd += some;
        }
    }
    return odd;
}

/* Each body with constants for its kind, so that the loops are vectorised. */
#define SWITCH(call)                                                                                                   \
    switch (kind) {                                                                                                    \
    case F32: {                                                                                                        \
        enum { K = F32 };                                                                                              \
        call;                                                                                                          \
    }                                                                                                                  \
    case F64: {                                                                                                        \
        enum { K = F64 };                                                                                              \
        call;                                                                                                          \
    }                                                                                                                  \
    case BF16: {                                                                                                       \
        enum { K = BF16 };                                                                                             \
        call;                                                                                                          \
    }                                                                                                                  \
    default: {                                                                                                         \
        enum { K = F16 };                                                                                              \
        call;                                                                                                          \
    }                                                                                                                  \
    }

#define VERSIONS(NAME, TARGET)                                                                                         \
    TARGET static void run_##NAME(row *to, int kind, const uint8_t *data, size_t n)                                    \
    {                                                                                                                  \
        SWITCH(body(to, K, data, n); return)                                                                           \
    }                                                                                                                  \
    TARGET static void apart_##NAME(int kind, const uint8_t *a, const uint8_t *b, size_t n, double *all)               \
    {                                                                                                                  \
        SWITCH(apart_body(K, a, b, n, all); return)                                                                    \
    }                                                                                                                  \
    TARGET static int64_t odd_##NAME(int kind, const uint8_t *data, size_t n)                                          \
    {                                                                                                                  \
        SWITCH(return odd_body(K, data, n))                                                                            \
    }

VERSIONS(base, )
static void (*run_best)(row *, int, const uint8_t *, size_t) = run_base;
static void (*apart_best)(int, const uint8_t *, const uint8_t *, size_t, double *) = apart_base;
static int64_t (*odd_best)(int, const uint8_t *, size_t) = odd_base;
#if X86
VERSIONS(avx2, AVX2)
#endif

/* --- for Python ------------------------------------------------------------------------------------- */

enum { MOST = 5 };

/* A buffer with a row for each tensor. */
typedef struct {
    Py_ssize_t width; /* bytes of a row */
    int written;
    int optional;
} column;

/* The arguments of a function: a kind and buffers. */
typedef struct {
    int kind;
    Py_ssize_t count; /* rows */
    Py_buffer views[MOST];
} tables;

static void release(tables *all)
{
    for (int i = 0; i < MOST; i++)
        if (all->views[i].obj)
            PyBuffer_Release(&all->views[i]);
}

/* Take the arguments; the first buffer tells how many rows there are. A buffer that is None has no memory. */
static int take(tables *all, PyObject *args, const column *columns, int count)
{
    memset(all, 0, sizeof *all);
    if (PyTuple_Size(args) != count + 1) {
        PyErr_Format(PyExc_TypeError, "expected a kind and %d buffers", count);
        return -1;
    }
    long kind = PyLong_AsLong(PyTuple_GetItem(args, 0));
    if (kind == -1 && PyErr_Occurred())
        return -1;
    if (kind < 0 || kind >= KINDS) {
        PyErr_SetString(PyExc_ValueError, "no such kind");
        return -1;
    }
    all->kind = (int)kind;
    for (int i = 0; i < count; i++) {
        PyObject *object = PyTuple_GetItem(args, i + 1);
        if (columns[i].optional && object == Py_None)
            continue;
        if (PyObject_GetBuffer(object, &all->views[i], columns[i].written ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0)
            goto failed;
        if (i == 0)
            all->count = all->views[0].len / columns[0].width;
        if (all->views[i].len != all->count * columns[i].width) {
            PyErr_SetString(PyExc_ValueError, "a buffer has another size than the tensors need");
            goto failed;
        }
    }
    return 0;
failed:
    release(all);
    return -1;
}

static PyObject *nothing(tables *all)
{
    release(all);
    Py_INCREF(Py_None);
    return Py_None;
}

static const uint8_t *at(uint64_t address) { return (const uint8_t *)(uintptr_t)address; }

static PyObject *py_measure(PyObject *self, PyObject *args)
{
    static const column columns[] = {{8}, {8}, {8 * SUMS, 1}, {8 * INTEGERS, 1}, {8 * EXPONENTS, 1, 1}};
    tables all;
    (void)self;
    if (take(&all, args, columns, 5) < 0)
        return NULL;
    const uint64_t *addresses = all.views[0].buf, *counts = all.views[1].buf;
    double *sums = all.views[2].buf;
    int64_t *integers = all.views[3].buf, *exponents = all.views[4].buf;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.count; i++) {
        row to = {.most = 0};
        if (exponents) {
            to.exponents = exponents + i * EXPONENTS;
            memset(to.exponents, 0, 8 * EXPONENTS);
        }
        run_best(&to, all.kind, at(addresses[i]), counts[i]);
        double sum = 0, squares = 0;
        for (int l = 0; l < LANES; l++) {
            sum += to.sum[l];
            squares += to.squares[l];
        }
        sums[SUMS * i] = sum;
        sums[SUMS * i + 1] = squares;
        sums[SUMS * i + 2] = to.most;
        integers[INTEGERS * i] = to.zeros;
        integers[INTEGERS * i + 1] = to.odd;
    }
    Py_END_ALLOW_THREADS
    return nothing(&all);
}

static PyObject *py_distance(PyObject *self, PyObject *args)
{
    static const column columns[] = {{8}, {8}, {8}, {16, 1}};
    tables all;
    (void)self;
    if (take(&all, args, columns, 4) < 0)
        return NULL;
    const uint64_t *a = all.views[0].buf, *b = all.views[1].buf, *counts = all.views[2].buf;
    double *sums = all.views[3].buf;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.count; i++)
        apart_best(all.kind, at(a[i]), at(b[i]), counts[i], sums + 2 * i);
    Py_END_ALLOW_THREADS
    return nothing(&all);
}

static PyObject *py_nonfinite(PyObject *self, PyObject *args)
{
    static const column columns[] = {{8}, {8}, {8, 1}};
    tables all;
    (void)self;
    if (take(&all, args, columns, 3) < 0)
        return NULL;
    const uint64_t *addresses = all.views[0].buf, *counts = all.views[1].buf;
    int64_t *found = all.views[2].buf;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all.count; i++)
        found[i] = odd_best(all.kind, at(addresses[i]), counts[i]);
    Py_END_ALLOW_THREADS
    return nothing(&all);
}

static PyObject *py_levels(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
#if X86
    __builtin_cpu_init();
    return PyLong_FromLong(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 2 : 1);
#else
    return PyLong_FromLong(1);
#endif
}

static void use(int wanted)
{
    run_best = run_base;
    apart_best = apart_base;
    odd_best = odd_base;
#if X86
    __builtin_cpu_init();
    if (wanted > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        run_best = run_avx2;
        apart_best = apart_avx2;
        odd_best = odd_avx2;
    }
#else
    (void)wanted;
#endif
}

static PyObject *py_use(PyObject *self, PyObject *args)
{
    int wanted;
    (void)self;
    if (!PyArg_ParseTuple(args, "i", &wanted))
        return NULL;
    use(wanted);
    Py_INCREF(Py_None);
    return Py_None;
}

static PyMethodDef methods[] = {
    {"measure", py_measure, METH_VARARGS, "measure(kind, addresses, counts, sums, integers, exponents)"},
    {"distance", py_distance, METH_VARARGS, "distance(kind, addresses, others, counts, sums)"},
    {"nonfinite", py_nonfinite, METH_VARARGS, "nonfinite(kind, addresses, counts, found)"},
    {"levels", py_levels, METH_NOARGS, "How many vector units can be used here."},
    {"use", py_use, METH_VARARGS, "use(i): use another vector unit from now on, the last being the best."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_moments", "Sums of many tensors in memory; defined in moments.py.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__moments(void)
{
    use(1);
    return PyModule_Create(&module);
}
