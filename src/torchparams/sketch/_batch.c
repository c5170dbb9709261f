/* Statistics of many small tensors in one call, with a row of numbers for each tensor.
 *
 * Sketch and measure.tensor_stats.derive define every number, in NumPy and in Python's integers;
 * nothing here may give another bit. Sums are exact integers, and mean, norms and deviation are rounded once.
 *
 *   measure(state, data, starts, counts, form, table, quantiles, reals, integers, extremes)
 *
 * counts `counts[i]` values from the offset `starts[i]` of `data`, or from an address where `data` is None.
 */

#include "_batch_derive.h"
#include "_batch_scan.h"

static const size_t item_size[KINDS] = {1, 2, 4, 8, 4, 4, 8, 8};

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
    choose_unit();
    return PyModule_Create(&module);
}
