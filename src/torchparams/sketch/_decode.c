/* Kernels of quantised weights: unpack codes, and multiply them by scales.
 *
 * decode.py defines the results, in NumPy; nothing here may give another result, except for the bits of NaN.
 * A difference and a product are each rounded to float32, so they must not be fused. The global interpreter
 * lock is released.
 *
 *   scaled(codes, table, scales, zeros, index, columns, height, width, lines, start, out)
 *   unpack(words, bits, order, codes, lanes, word_step, lane_step, code_out, lane_out, out)
 *   narrow(values, out): float32 to bfloat16, and what is lost
 */

#include "_common.h"

#if !IEEE
#error "products need IEEE floats without excess precision: other machines use the NumPy definition"
#endif

#if X86
#define AVX2 TARGET("avx2")
#endif

enum {
    VALUES = 256, /* of a table */
    LANES = 16,   /* neighbours that are unpacked together: words of one cache line */
    WORDS = 8,    /* of a neighbour at once: their codes, of four bits, are one cache line */
};

/* --- scales --------------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *codes;
    const float *table, *scales, *zeros;
    const int32_t *index;
    size_t columns, height, width, lines, start, n;
} job;

/* How the table gives the value of a code: by a look-up, or as the code itself, or the code with a sign, plus a number.
 * The last two need no look-up, which takes several times as long. */
enum { LOOKED_UP, COUNTED, SIGNED };

typedef void (*run_of)(int, const uint8_t *, const float *, const float *, const float *, size_t, size_t, float *);

/* Neighbours with one zero and scale (a step of 0), or one each (a step of 1). */
static void run_base(int kind, const uint8_t *codes, const float *table, const float *zeros, const float *scales,
                     size_t step, size_t n, float *out)
{
    (void)kind;
    for (size_t i = 0; i < n; i++)
        out[i] = (table[codes[i]] - (zeros ? zeros[i * step] : 0)) * scales[i * step];
}

#if X86
AVX2 INLINE __m256 eight_values(int kind, const uint8_t *codes, const float *table, __m256 base)
{
    __m128i bytes = _mm_loadl_epi64((const __m128i *)codes);
    if (kind == LOOKED_UP)
        return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(bytes), 4);
    __m256i numbers = kind == SIGNED ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
    return _mm256_add_ps(_mm256_cvtepi32_ps(numbers), base);
}

AVX2 INLINE void run_kind(int kind, const uint8_t *codes, const float *table, const float *zeros, const float *scales,
                          size_t step, size_t n, float *out)
{
    __m256 base = _mm256_set1_ps(table[0]);
    size_t i = 0;
    if (step == 0 && n >= 8) {
        __m256 zero = _mm256_set1_ps(zeros ? *zeros : 0), scale = _mm256_set1_ps(*scales);
        for (; i + 8 <= n; i += 8) {
            __m256 values = _mm256_sub_ps(eight_values(kind, codes + i, table, base), zero);
            _mm256_storeu_ps(out + i, _mm256_mul_ps(values, scale));
        }
    } else if (step == 1)
        for (; i + 8 <= n; i += 8) {
            __m256 zero = zeros ? _mm256_loadu_ps(zeros + i) : _mm256_setzero_ps();
            __m256 values = _mm256_sub_ps(eight_values(kind, codes + i, table, base), zero);
            _mm256_storeu_ps(out + i, _mm256_mul_ps(values, _mm256_loadu_ps(scales + i)));
        }
    run_base(kind, codes + i, table, zeros ? zeros + i * step : NULL, scales + i * step, step, n - i, out + i);
}

AVX2 static void run_avx2(int kind, const uint8_t *codes, const float *table, const float *zeros, const float *scales,
                          size_t step, size_t n, float *out)
{
    if (kind == COUNTED)
        run_kind(COUNTED, codes, table, zeros, scales, step, n, out);
    else if (kind == SIGNED)
        run_kind(SIGNED, codes, table, zeros, scales, step, n, out);
    else
        run_kind(LOOKED_UP, codes, table, zeros, scales, step, n, out);
}
#endif

static int is_bits(float a, float b) /* -0 is another value than 0 here, and NaN is none */
{
    return memcmp(&a, &b, sizeof a) == 0;
}

static int kind_of(const float *table)
{
    int counted = 1, with_sign = 1;
    if (!(table[0] >= -VALUES && table[0] <= VALUES) || table[0] != (float)(int)table[0])
        return LOOKED_UP;
    for (int i = 0; i < VALUES; i++) { /* sums of small whole numbers are exact */
        counted &= is_bits(table[i], table[0] + (float)i);
        with_sign &= is_bits(table[i], table[0] + (float)(i < VALUES / 2 ? i : i - VALUES));
    }
    return counted ? COUNTED : with_sign ? SIGNED : LOOKED_UP;
}

static run_of run_best = run_base;

static void scale_all(const job *j, float *out)
{
    size_t row = j->start / j->columns, column = j->start % j->columns, at = 0;
    int kind = kind_of(j->table);
    while (at < j->n) {
        const float *scales = j->scales + row / j->height * j->lines;
        const float *zeros = j->zeros ? j->zeros + row / j->height * j->lines : NULL;
        size_t end = j->columns - column < j->n - at ? at + j->columns - column : j->n;
        if (j->width == 1 && !j->index) {
            run_best(kind, j->codes + at, j->table, zeros ? zeros + column : NULL, scales + column, 1, end - at, out + at);
            at = end;
        } else if (j->index) {
            for (; at < end; at++, column++) {
                size_t group = (size_t)j->index[column];
                out[at] = (j->table[j->codes[at]] - (zeros ? zeros[group] : 0)) * scales[group];
            }
        }
        while (at < end) {
            size_t group = column / j->width, n = j->width - column % j->width;
            if (n > end - at)
                n = end - at;
            run_best(kind, j->codes + at, j->table, zeros ? zeros + group : NULL, scales + group, 0, n, out + at);
            at += n;
            column += n;
        }
        column = 0;
        row++;
    }
}

/* The views of the arguments, released together; `y*` of None is an empty one. */
enum { CODES, TABLE, SCALES, ZEROS, INDEX, OUT, VIEWS };

static int is_sound(const job *j, const Py_buffer *views)
{
    const char *wrong = NULL;
    if (!j->columns || !j->height || !j->width || !j->lines)
        wrong = "there are no columns, or blocks are empty";
    else if (views[TABLE].len != VALUES * (Py_ssize_t)sizeof(float))
        wrong = "the table has not 256 values";
    else if ((size_t)views[OUT].len != j->n * sizeof(float))
        wrong = "there is not a result for each code";
    else if (j->index ? (size_t)views[INDEX].len != j->columns * sizeof(int32_t)
                      : (j->columns - 1) / j->width >= j->lines)
        wrong = "the groups do not fit the columns";
    else if (j->n) {
        size_t last = (j->start + j->n - 1) / j->columns / j->height;
        if (((size_t)views[SCALES].len / sizeof(float)) / j->lines <= last)
            wrong = "there are too few scales";
        else if (j->zeros && views[ZEROS].len != views[SCALES].len)
            wrong = "there is not a zero for each scale";
    }
    for (size_t i = 0; !wrong && j->index && i < j->columns; i++)
        if (j->index[i] < 0 || (size_t)j->index[i] >= j->lines)
            wrong = "an index is out of range";
    for (int i = TABLE; !wrong && i < VIEWS; i++)
        if ((uintptr_t)views[i].buf % sizeof(float))
            wrong = "the memory is not aligned";
    if (wrong)
        PyErr_SetString(PyExc_ValueError, wrong);
    return !wrong;
}

static PyObject *py_scaled(PyObject *self, PyObject *args)
{
    Py_buffer views[VIEWS];
    job j;
    Py_ssize_t columns, height, width, lines, start;
    PyObject *result = NULL;
    (void)self;
    memset(views, 0, sizeof views);
    if (!PyArg_ParseTuple(args, "y*y*y*z*z*nnnnnw*", &views[CODES], &views[TABLE], &views[SCALES], &views[ZEROS],
                          &views[INDEX], &columns, &height, &width, &lines, &start, &views[OUT]))
        return NULL;
    j.codes = views[CODES].buf;
    j.table = views[TABLE].buf;
    j.scales = views[SCALES].buf;
    j.zeros = views[ZEROS].buf;
    j.index = views[INDEX].buf;
    j.columns = (size_t)columns;
    j.height = (size_t)height;
    j.width = (size_t)width;
    j.lines = (size_t)lines;
    j.start = (size_t)start;
    j.n = (size_t)views[CODES].len;
    if (columns < 0 || height < 0 || width < 0 || lines < 0 || start < 0)
        PyErr_SetString(PyExc_ValueError, "a size is negative");
    else if (is_sound(&j, views)) {
        Py_BEGIN_ALLOW_THREADS
        scale_all(&j, views[OUT].buf);
        Py_END_ALLOW_THREADS
        Py_INCREF(Py_None);
        result = Py_None;
    }
    for (int i = 0; i < VIEWS; i++)
        PyBuffer_Release(&views[i]);
    return result;
}

/* --- words ---------------------------------------------------------------------------------------- */

typedef struct {
    const uint32_t *words;
    uint8_t *out;
    const uint8_t *order; /* of whole words: which code of the word's each field holds */
    size_t bits, codes, lanes, word_step, lane_step, code_out, lane_out;
} packing;

/* Eight codes of four bits, a byte each. */
INLINE uint64_t spread4(uint32_t word)
{
    uint64_t x = word;
    x = (x | x << 16) & 0x0000FFFF0000FFFFu;
    x = (x | x << 8) & 0x00FF00FF00FF00FFu;
    return (x | x << 4) & 0x0F0F0F0F0F0F0F0Fu;
}

INLINE void whole_word(const packing *p, size_t bits, uint32_t word, size_t n, uint8_t *out)
{
    const size_t per = 32 / bits;
    const uint32_t mask = (1u << bits) - 1;
    if (n == per)
        for (size_t i = 0; i < per; i++)
            out[p->order[i] * p->code_out] = (uint8_t)(word >> (i * bits) & mask);
    else /* the last word is not full; only where the order is the natural one */
        for (size_t i = 0; i < n; i++)
            out[i * p->code_out] = (uint8_t)(word >> (i * bits) & mask);
}

INLINE void whole_words(const packing *p, size_t bits, int dense)
{
    const size_t per = 32 / bits, step = WORDS * per;
    for (size_t first = 0; first < p->lanes; first += LANES) {
        size_t end = p->lanes - first < LANES ? p->lanes : first + LANES;
        for (size_t begin = 0; begin < p->codes; begin += step) {
            size_t last = p->codes - begin < step ? p->codes : begin + step;
            for (size_t lane = first; lane < end; lane++)
                for (size_t code = begin; code < last; code += per) {
                    uint32_t word = p->words[code / per * p->word_step + lane * p->lane_step];
                    uint8_t *out = p->out + code * p->code_out + lane * p->lane_out;
                    size_t n = p->codes - code < per ? p->codes - code : per;
                    if (dense && n == per) {
                        uint64_t codes = spread4(word);
                        memcpy(out, &codes, sizeof codes);
                    } else
                        whole_word(p, bits, word, n, out);
                }
        }
    }
}

/* Words side by side whose codes belong into rows, each of them contiguous: of four bits, of which most files are. */
static void rows_of4(const packing *p)
{
    for (size_t code = 0; code < p->codes; code++) {
        const uint32_t *words = p->words + code / 8 * p->word_step;
        uint8_t *out = p->out + code * p->code_out;
        const unsigned shift = (unsigned)(code % 8 * 4);
        for (size_t lane = 0; lane < p->lanes; lane++)
            out[lane] = (uint8_t)(words[lane] >> shift & 15);
    }
}

static int is_natural(const packing *p)
{
    for (uint8_t i = 0; i < 8; i++)
        if (p->order[i] != i)
            return 0;
    return 1;
}

static int is_dense(const packing *p)
{
    return is_natural(p) && p->code_out == 1;
}

static void any_bits(const packing *p)
{
    const uint32_t mask = (1u << p->bits) - 1;
    for (size_t first = 0; first < p->lanes; first += LANES) {
        size_t end = p->lanes - first < LANES ? p->lanes : first + LANES;
        for (size_t code = 0; code < p->codes; code++) {
            size_t at = code * p->bits, shift = at % 32;
            const uint32_t *words = p->words + at / 32 * p->word_step;
            for (size_t lane = first; lane < end; lane++) {
                uint64_t pair = words[lane * p->lane_step];
                if (shift + p->bits > 32)
                    pair |= (uint64_t)words[p->word_step + lane * p->lane_step] << 32;
                p->out[code * p->code_out + lane * p->lane_out] = (uint8_t)(pair >> shift & mask);
            }
        }
    }
}

static void unpack_all(const packing *p)
{
    switch (p->bits) {
    case 1:
        whole_words(p, 1, 0);
        break;
    case 2:
        whole_words(p, 2, 0);
        break;
    case 4:
        if (p->lane_step == 1 && p->lane_out == 1 && is_natural(p))
            rows_of4(p);
        else if (is_dense(p))
            whole_words(p, 4, 1);
        else
            whole_words(p, 4, 0);
        break;
    case 8:
        whole_words(p, 8, 0);
        break;
    default:
        any_bits(p);
    }
}

static int is_packing(const packing *p, const Py_buffer *words, const Py_buffer *order, const Py_buffer *out)
{
    const char *wrong = NULL;
    if (p->bits < 1 || p->bits > 8)
        wrong = "codes have 1 to 8 bits";
    else if (32 % p->bits == 0 && (size_t)order->len != 32 / p->bits)
        wrong = "the order is not that of a word";
    else if (p->codes && p->lanes) {
        size_t last = (p->codes * p->bits - 1) / 32 * p->word_step + (p->lanes - 1) * p->lane_step;
        if (last >= (size_t)words->len / sizeof(uint32_t) || (uintptr_t)words->buf % sizeof(uint32_t))
            wrong = "there are too few words, or they are not aligned";
        else if ((p->codes - 1) * p->code_out + (p->lanes - 1) * p->lane_out >= (size_t)out->len)
            wrong = "the result is too small";
    }
    for (Py_ssize_t i = 0; !wrong && i < order->len; i++)
        if (p->order[i] >= order->len)
            wrong = "the order is not one";
    if (wrong)
        PyErr_SetString(PyExc_ValueError, wrong);
    return !wrong;
}

static PyObject *py_unpack(PyObject *self, PyObject *args)
{
    Py_buffer words, order, out;
    Py_ssize_t bits, codes, lanes, word_step, lane_step, code_out, lane_out;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*ny*nnnnnnw*", &words, &bits, &order, &codes, &lanes, &word_step, &lane_step,
                          &code_out, &lane_out, &out))
        return NULL;
    packing p = {words.buf,        out.buf,           order.buf,         (size_t)bits,     (size_t)codes,
                 (size_t)lanes,    (size_t)word_step, (size_t)lane_step, (size_t)code_out, (size_t)lane_out};
    if (codes < 0 || lanes < 0 || word_step < 0 || lane_step < 0 || code_out < 0 || lane_out < 0)
        PyErr_SetString(PyExc_ValueError, "a size is negative");
    else if (is_packing(&p, &words, &order, &out)) {
        Py_BEGIN_ALLOW_THREADS
        unpack_all(&p);
        Py_END_ALLOW_THREADS
        Py_INCREF(Py_None);
        result = Py_None;
    }
    PyBuffer_Release(&words);
    PyBuffer_Release(&order);
    PyBuffer_Release(&out);
    return result;
}

/* --- float32 to bfloat16 ------------------------------------------------------------------------- */

enum { NARROW = 1 << 12 }; /* elements whose counts fit 32 bits, with much to spare */

INLINE void narrow_some(const uint32_t *values, uint16_t *out, size_t n, size_t counts[3])
{
    uint32_t over = 0, under = 0, changed = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t x = values[i], size = x & 0x7FFFFFFFu, is_nan = size > 0x7F800000u;
        uint32_t y = (x + 0x7FFFu + (x >> 16 & 1)) >> 16; /* to nearest, ties to even */
        out[i] = (uint16_t)(is_nan ? (x >> 16 & 0x8000u) | 0x7FC0u : y);
        over += (size > 0x7F7F0000u) & (size < 0x7F800000u); /* beyond the largest bfloat16 */
        under += (size != 0) & ((y & 0x7FFFu) == 0) & !is_nan;
        changed += ((x & 0xFFFFu) != 0) & !is_nan;
    }
    counts[0] += over;
    counts[1] += under;
    counts[2] += changed;
}

INLINE void narrow_all(const uint32_t *values, uint16_t *out, size_t n, size_t counts[3])
{
    for (size_t i = 0; i < n; i += NARROW)
        narrow_some(values + i, out + i, n - i < NARROW ? n - i : NARROW, counts);
}

typedef void (*narrow_of)(const uint32_t *, uint16_t *, size_t, size_t *);

static void narrow_base(const uint32_t *values, uint16_t *out, size_t n, size_t *counts)
{
    narrow_all(values, out, n, counts);
}

#if X86
AVX2 static void narrow_avx2(const uint32_t *values, uint16_t *out, size_t n, size_t *counts)
{
    narrow_all(values, out, n, counts);
}
#endif

static narrow_of narrow_best = narrow_base;

static PyObject *py_narrow(PyObject *self, PyObject *args)
{
    Py_buffer values, out;
    size_t counts[3] = {0, 0, 0};
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*", &values, &out))
        return NULL;
    if (values.len != out.len * 2 || values.len % 4 || (uintptr_t)values.buf % 4 || (uintptr_t)out.buf % 2)
        PyErr_SetString(PyExc_ValueError, "there is not a result for each value, or the memory is not aligned");
    else {
        Py_BEGIN_ALLOW_THREADS
        narrow_best(values.buf, out.buf, (size_t)values.len / 4, counts);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("nnn", (Py_ssize_t)counts[0], (Py_ssize_t)counts[1], (Py_ssize_t)counts[2]);
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    return result;
}

/* --- Python --------------------------------------------------------------------------------------- */

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
    run_best = run_base;
    narrow_best = narrow_base;
#if X86
    __builtin_cpu_init();
    if (wanted > 0 && __builtin_cpu_supports("avx2")) {
        run_best = run_avx2;
        narrow_best = narrow_avx2;
    }
#endif
    Py_INCREF(Py_None);
    return Py_None;
}

static PyMethodDef methods[] = {
    {"scaled", py_scaled, METH_VARARGS, "scaled(codes, …, out): (table[code] - zero) * scale."},
    {"unpack", py_unpack, METH_VARARGS, "unpack(words, …, out): codes of a few bits, a byte each."},
    {"narrow", py_narrow, METH_VARARGS, "narrow(values, out): to bfloat16; overflows, underflows, changes."},
    {"levels", py_levels, METH_NOARGS, "How many vector units can be used here."},
    {"use", py_use, METH_VARARGS, "use(i): use another vector unit from now on, the last being the best."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_decode", "The kernels of quantised weights; defined in decode.py.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__decode(void)
{
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        run_best = run_avx2;
        narrow_best = narrow_avx2;
    }
#endif
    return PyModule_Create(&module);
}
