/* Comparisons by AVX-512. */

#include "_common.h"

#if X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define LEVEL torchparams_compare_avx512
#define FUSED 1
#define PARTS 1
#include "_compare_lanes.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
