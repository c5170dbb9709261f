/* Comparisons by AVX2. */

#include "_common.h"

#if X86
#pragma GCC target("avx2,fma")
#define LEVEL torchparams_compare_avx2
#define FUSED 1
#define PARTS 4
#include "_compare_lanes.h"
#endif
