/* Common ground of the kernels: Python's limited API, byte order, inlining, and the vector units of x86. */

#ifndef TORCHPARAMS_COMMON_H
#define TORCHPARAMS_COMMON_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "values are read as they lie in files, little-endian: other machines use the NumPy definition"
#endif

/* Whether floats are IEEE's, without excess precision. */
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#define IEEE 0
#else
#define IEEE 1
#endif

/* HIDDEN: known to the other files of an extension, and not outside it. */
#if defined(__GNUC__)
#define HIDDEN __attribute__((visibility("hidden")))
#define INLINE static inline __attribute__((always_inline))
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define PREFETCH(p) __builtin_prefetch(p)
#else
#define HIDDEN
#define INLINE static __forceinline
#define UNLIKELY(x) (x)
#define PREFETCH(p) ((void)0)
#endif

/* Whether a function can be compiled for a vector unit that is chosen at run time. */
#if defined(__GNUC__) && defined(__x86_64__) && IEEE
#define X86 1
#define TARGET(units) __attribute__((target(units)))
#include <immintrin.h>
#else
#define X86 0
#endif

#endif
