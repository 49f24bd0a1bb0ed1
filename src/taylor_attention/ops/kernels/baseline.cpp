// The kernels for what every machine of the architecture has: SSE2 on x86, NEON on ARM.
#include "standard.h"

#define TARGET baseline
#define VECTOR_BYTES 16
#if defined(__x86_64__)
#define TILE_ROWS 6
#else
#define TILE_ROWS 8
#endif
#include "kernels.h"
