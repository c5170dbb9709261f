/* Kernel of comparisons of two sequences of values of one type.
 *
 * compare.py defines the results, in NumPy; nothing here may give another result. Sums are exact,
 * so results depend neither on the width of vectors nor on the cuts between blocks.
 *
 * A comparison is a block of memory owned by the caller (`size()` bytes, zeros to begin with):
 *
 *   update(state, kind, unit, table, a, b)   compares; the global interpreter lock is released
 *   finish(state)                            returns the result, and resets the state
 *
 * `equal(a, b)` is a fast test for blocks without a difference.
 */

#include "_compare.h"

/* --- the vector unit, chosen when the module is loaded -------------------------------------------- */

#if X86
static compare_function *const *const comparers[] = {
    torchparams_compare_baseline, torchparams_compare_avx2, torchparams_compare_avx512,
};
#else
static compare_function *const *const comparers[] = {torchparams_compare_baseline};
#endif

static int best_level = 0, level = 0;

static int find_level(void)
{
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

static void compare_block(comparison *s, int kind, size_t unit, const double *table, const uint8_t *a,
                          const uint8_t *b, size_t n)
{
#if X86
    /* The processor may be set to flush subnormal numbers to zero, and to another rounding mode. */
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
                /* shorter than a handover of the lock */
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
        result = Py_BuildValue("(KKKKKdNNNN)", (unsigned long long)s->changed, (unsigned long long)s->nan_a,
                               (unsigned long long)s->nan_b, (unsigned long long)s->infinite,
                               (unsigned long long)s->max_integer, s->max, limbs_to_bytes(s->same),
                               limbs_to_bytes(s->aa), limbs_to_bytes(s->bb), limbs_to_bytes(s->ab));
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
