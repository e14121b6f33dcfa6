// Everything that kernels_*.cpp include before they switch the compiler to their instruction set: shared inline
// functions must not be compiled for a CPU that may be absent, since the linker keeps any one copy of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention/dropout.h"
#include "attention/sequence.h"
#include "cpu/elements.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/schedule.h"
#include "params.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
