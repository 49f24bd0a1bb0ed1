// Standard headers come before any target is set: what they define inline must run on every machine.
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.h"
