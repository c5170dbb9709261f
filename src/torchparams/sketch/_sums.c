/* Kernel of weighted sums of bfloat16 or float32 tensors, in float32, rounded once.
 *
 * sums.py defines the results, in NumPy; nothing here may give another result, except for the bits of NaN.
 * Each product and each sum is rounded to float32, in the order of the tensors: none may be fused.
 *
 *   weighted(out, kind, parts)   parts is a tuple of (buffer, kind, weight); the global interpreter lock is released.
 *                                Returns the number of results that are not finite although their elements are.
 */

#include "_common.h"

#if !IEEE
#error "sums need IEEE floats without excess precision: other machines use the NumPy definition"
#endif

#if X86
#define AVX2 TARGET("avx2")
#endif

enum kind { BF16, F32, KINDS };

static const size_t item_size[KINDS] = {2, 4};

enum {
    CHUNK = 2048, /* values whose sum stays in the first-level cache */
    MOST = 64,    /* tensors of one sum */
};

typedef struct {
    const char *data;
    int kind;
    float weight;
} part;

/* --- a chunk -------------------------------------------------------------------------------------- */

INLINE void add_bf16(float *restrict total, const uint16_t *restrict x, float weight, size_t n, int first)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        float value;
        memcpy(&value, &bits, 4);
        value *= weight;
        total[i] = first ? value : total[i] + value;
    }
}

INLINE void add_f32(float *restrict total, const float *restrict x, float weight, size_t n, int first)
{
    for (size_t i = 0; i < n; i++) {
        float value = x[i] * weight;
        total[i] = first ? value : total[i] + value;
    }
}

/* To the nearest, ties to even; NaN to the quiet one of its sign. Returns how many results are not finite. */
INLINE uint32_t round_bf16(uint16_t *restrict out, const float *restrict total, size_t n)
{
    uint32_t odd = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &total[i], 4);
        uint32_t magnitude = bits & 0x7fffffff;
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        uint32_t nan = (bits >> 16 & 0x8000) | 0x7fc0;
        odd += (magnitude > 0x7f800000) | ((rounded & 0x7fff) == 0x7f80);
        out[i] = (uint16_t)(magnitude > 0x7f800000 ? nan : rounded);
    }
    return odd;
}

/* Returns how many results are not finite. */
INLINE uint32_t copy_f32(float *restrict out, const float *restrict total, size_t n)
{
    uint32_t odd = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &total[i], 4);
        odd += (bits & 0x7f800000) == 0x7f800000;
        out[i] = total[i];
    }
    return odd;
}

static int is_finite(const char *x, int kind, size_t at)
{
    if (kind == BF16)
        return (((const uint16_t *)x)[at] & 0x7f80) != 0x7f80;
    uint32_t bits;
    memcpy(&bits, x + at * sizeof(float), 4);
    return (bits & 0x7f800000) != 0x7f800000;
}

/* How many results are not finite although all elements are that they are sums of. */
static uint64_t overflows(const char *out, int kind, const part *parts, size_t count, size_t at, size_t m)
{
    uint64_t over = 0;
    for (size_t i = at; i < at + m; i++) {
        int odd = !is_finite(out, kind, i);
        for (size_t k = 0; odd && k < count; k++)
            odd = is_finite(parts[k].data, parts[k].kind, i);
        over += (uint64_t)odd;
    }
    return over;
}

INLINE uint64_t weigh(char *out, int kind, const part *parts, size_t count, size_t n)
{
    float total[CHUNK];
    uint64_t over = 0;
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t m = n - at < CHUNK ? n - at : CHUNK;
        for (size_t i = 0; i < count; i++) {
            const char *x = parts[i].data + at * item_size[parts[i].kind];
            if (parts[i].kind == BF16 && i == 0)
                add_bf16(total, (const uint16_t *)x, parts[i].weight, m, 1);
            else if (parts[i].kind == BF16)
                add_bf16(total, (const uint16_t *)x, parts[i].weight, m, 0);
            else if (i == 0)
                add_f32(total, (const float *)x, parts[i].weight, m, 1);
            else
                add_f32(total, (const float *)x, parts[i].weight, m, 0);
        }
        uint32_t odd = kind == BF16 ? round_bf16((uint16_t *)out + at, total, m) : copy_f32((float *)out + at, total, m);
        if (odd)
            over += overflows(out, kind, parts, count, at, m);
    }
    return over;
}

static uint64_t weigh_base(char *out, int kind, const part *parts, size_t count, size_t n)
{
    return weigh(out, kind, parts, count, n);
}

#if X86
AVX2 static uint64_t weigh_avx2(char *out, int kind, const part *parts, size_t count, size_t n)
{
    return weigh(out, kind, parts, count, n);
}
#endif

static uint64_t (*weigh_best)(char *, int, const part *, size_t, size_t) = weigh_base;

/* --- Python --------------------------------------------------------------------------------------- */

static int is_kind(int kind)
{
    if (kind >= 0 && kind < KINDS)
        return 1;
    PyErr_SetString(PyExc_ValueError, "no such kind of values");
    return 0;
}

static PyObject *py_weighted(PyObject *self, PyObject *args)
{
    Py_buffer out, views[MOST];
    part parts[MOST];
    int kind;
    PyObject *list, *result = NULL;
    Py_ssize_t held = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*iO!", &out, &kind, &PyTuple_Type, &list))
        return NULL;
    Py_ssize_t count = PyTuple_Size(list);
    if (count < 1 || count > MOST) {
        PyErr_SetString(PyExc_ValueError, "too many tensors, or none");
        goto done;
    }
    if (!is_kind(kind))
        goto done;
    size_t n = (size_t)out.len / item_size[kind];
    if ((uintptr_t)out.buf % item_size[kind] || (size_t)out.len % item_size[kind]) {
        PyErr_SetString(PyExc_ValueError, "the result has no whole elements, or is not aligned");
        goto done;
    }
    for (; held < count; held++) {
        if (!PyArg_ParseTuple(PyTuple_GetItem(list, held), "y*if", &views[held], &parts[held].kind, &parts[held].weight))
            goto done;
        parts[held].data = views[held].buf;
        int known = is_kind(parts[held].kind);
        size_t size = known ? item_size[parts[held].kind] : 1;
        if (!known || (size_t)views[held].len != n * size || (uintptr_t)views[held].buf % size) {
            if (known)
                PyErr_SetString(PyExc_ValueError, "the tensors have different sizes, or are not aligned");
            held++;
            goto done;
        }
    }
    uint64_t over;
    Py_BEGIN_ALLOW_THREADS
    over = weigh_best(out.buf, kind, parts, (size_t)count, n);
    Py_END_ALLOW_THREADS
    result = PyLong_FromUnsignedLongLong(over);
done:
    while (held > 0)
        PyBuffer_Release(&views[--held]);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *py_levels(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
#if X86
    __builtin_cpu_init();
    return PyLong_FromLong(__builtin_cpu_supports("avx2") ? 2 : 1);
#else
    return PyLong_FromLong(1);
#endif
}

static PyObject *py_use(PyObject *self, PyObject *args)
{
    int wanted;
    (void)self;
    if (!PyArg_ParseTuple(args, "i", &wanted))
        return NULL;
    weigh_best = weigh_base;
#if X86
    __builtin_cpu_init();
    if (wanted > 0 && __builtin_cpu_supports("avx2"))
        weigh_best = weigh_avx2;
#endif
    Py_INCREF(Py_None);
    return Py_None;
}

static PyMethodDef methods[] = {
    {"weighted", py_weighted, METH_VARARGS, "weighted(out, kind, parts): a weighted sum, rounded once."},
    {"levels", py_levels, METH_NOARGS, "How many vector units can be used here."},
    {"use", py_use, METH_VARARGS, "use(i): use another vector unit from now on, the last being the best."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_sums", "The kernel of weighted sums; defined in sums.py.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__sums(void)
{
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2"))
        weigh_best = weigh_avx2;
#endif
    return PyModule_Create(&module);
}
