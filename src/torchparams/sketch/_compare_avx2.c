/* Comparisons by AVX2. */

#include "_common.h"

#if X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LEVEL torchparams_compare_avx2
#define FUSED 1
#define PARTS 4
#include "_compare_lanes.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
