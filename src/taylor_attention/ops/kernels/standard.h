// Standard headers come before any target is set: what they define inline must run on every machine.
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <utility>

#include "problem.h"
