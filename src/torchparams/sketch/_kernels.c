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

#include "_kernels_sums.h"

static const int item_size[KINDS] = {1, 2, 4, 8, 4, 4, 8, 8};

/* --- the vector unit, chosen when the module is loaded ---------------------------------------- */

#define LEVEL(NUMBER)                                                                                                  \
    {                                                                                                                  \
        update_p8, update_p16, update_f32_##NUMBER, update_f64, update_i32_##NUMBER, update_u32_##NUMBER,              \
            update_i64_##NUMBER, update_u64_##NUMBER,                                                                  \
    }

static update_function *const updates[][KINDS] = {
    LEVEL(0),
#if X86
    LEVEL(1),
    LEVEL(2),
#endif
};

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
