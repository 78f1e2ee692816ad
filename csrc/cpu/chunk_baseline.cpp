#include "chunk.h"

#define LOOKBEHIND_ISA baseline
#include "chunk.inc"
