// Device functions that the kernels call, with CUDA's meaning.
#pragma once

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __float_as_uint(float value) { return (unsigned)runner::to_bits(value); }
inline float __uint_as_float(unsigned bits) { return runner::from_bits<float>(bits); }

// The host compiler is told not to contract, so that these are single roundings and two of them are two.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
