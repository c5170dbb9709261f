/* What the kernels of the sketch share: the layout of a tally, and the functions between their files. */

#ifndef TORCHPARAMS_KERNELS_H
#define TORCHPARAMS_KERNELS_H

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

/* Counts `n` elements of `data`; with `mark`, their codes get marks. */
typedef void update_function(tally *, const uint8_t *data, size_t n, int mark);

/* One for each vector unit, where it is of use; the number is that of the unit, as `levels` lists them. */
#define DECLARE_LEVEL(TARGET, NUMBER)                                                                                  \
    TARGET HIDDEN update_function update_f32_##NUMBER, update_i32_##NUMBER, update_u32_##NUMBER, update_i64_##NUMBER,  \
        update_u64_##NUMBER;

HIDDEN update_function update_p8, update_p16, update_f64;
DECLARE_LEVEL(, 0)
#if X86
#define AVX2 TARGET("avx2,fma")
#if defined(__clang__) /* which ignores a target that names a width */
#define AVX512 TARGET("avx512f,avx512bw,avx512dq,avx512vl")
#else
#define AVX512 TARGET("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
DECLARE_LEVEL(AVX2, 1)
DECLARE_LEVEL(AVX512, 2)
#endif

/* Whether 64 samples of `n` codes, one every `size` bytes, are widely spread. */
HIDDEN int spread_out(const uint8_t *data, size_t n, size_t size);

/* Collects the codes with a count into t->codes and t->counts, in order; clears every counter. */
HIDDEN size_t collect(tally *t, int kind);

/* Add what the bins hold to the sums. */
HIDDEN void flush_f32(tally *t);
HIDDEN void flush_f64(tally *t);

#endif
