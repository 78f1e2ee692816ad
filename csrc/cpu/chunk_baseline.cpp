#include "chunk.h"

#define LOOKBEHIND_ISA baseline
#ifdef LOOKBEHIND_X86
#define LOOKBEHIND_VECTOR 16
#else
#define LOOKBEHIND_VECTOR 0
#endif
#include "chunk.inc"
