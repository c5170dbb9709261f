/* Comparisons without a vector unit that has to be asked for. */

#define LEVEL torchparams_compare_baseline
#define FUSED 0
#define PARTS 4
#include "_compare_lanes.h"
