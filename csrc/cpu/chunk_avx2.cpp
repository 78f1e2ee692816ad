#include "chunk.h"

#ifdef LOOKBEHIND_X86
#pragma GCC target("avx2,fma")
#define LOOKBEHIND_ISA avx2
#define LOOKBEHIND_FMA 1
#define LOOKBEHIND_VECTOR 32
#include "chunk.inc"
#endif
