// A macro for functions that are compiled for both the CPU and CUDA.
#pragma once

#if defined(__CUDACC__)
#define DCVIT_HD __host__ __device__ __forceinline__
#else
#define DCVIT_HD inline __attribute__((always_inline))
#endif
