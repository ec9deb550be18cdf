// The words that CUDA adds to C++.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline
// One block runs at a time, so a static variable is shared memory; the section is found and poisoned before each block.
#define __shared__ static __attribute__((section("shared_memory")))

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

using std::max;
using std::min;
