/* The state of a comparison, and its kernels: one table for each vector unit. */

#ifndef TORCHPARAMS_COMPARE_H
#define TORCHPARAMS_COMPARE_H

#include "_common.h"

#if !IEEE
#error "sums need IEEE doubles without excess precision: other machines use the NumPy definition"
#endif

enum kind { P8, BF16, F16, F32, F64, I16, U16, I32, U32, I64, U64, KINDS };

static const size_t item_size[KINDS] = {1, 2, 2, 4, 8, 2, 2, 4, 4, 8, 8};

enum {
    GROUP = 256,  /* values that are added up together */
    LOG = 8,      /* its logarithm */
    LANES = 8,    /* sums that run side by side */
    STEP = 53 - LOG,
    LIMBS = 136,  /* 32 bits each: 4196 of a product of doubles, and room to grow */
    SUMS = 6,     /* of the longest cascade */
    CARRY = 1024, /* groups after which limbs are carried; they have room for a thousand times as many */
};

typedef struct {
    uint64_t changed;      /* number of units whose bytes differ */
    uint64_t nan_a, nan_b; /* NaN in one only */
    uint64_t infinite;     /* infinite in one only, or of the other sign; none is NaN */
    uint64_t max_integer;  /* greatest |b - a| of 64-bit integers */
    double max;            /* greatest |b - a| of other values that are finite in both */
    int64_t same[LIMBS];   /* squares where a group is equal in both */
    int64_t aa[LIMBS], bb[LIMBS], ab[LIMBS];
} comparison;

/* Compares `n` values of `a` and `b`, in units of so many bytes. */
typedef void compare_function(comparison *, size_t unit, const double *table, const uint8_t *a, const uint8_t *b,
                              size_t n);

extern compare_function *const torchparams_compare_baseline[KINDS];
#if X86
extern compare_function *const torchparams_compare_avx2[KINDS];
extern compare_function *const torchparams_compare_avx512[KINDS];
#endif

#endif
