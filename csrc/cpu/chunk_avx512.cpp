#include "chunk.h"

#ifdef LOOKBEHIND_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define LOOKBEHIND_ISA avx512
#define LOOKBEHIND_FMA 1
#define LOOKBEHIND_VECTOR 64
#include "chunk.inc"
#endif
