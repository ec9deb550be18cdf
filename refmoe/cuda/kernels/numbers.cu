// SPDX-License-Identifier: Apache-2.0
// Put before the text of every other file: stored numbers, pieces of rows, the sum over a warp.
//
// Plain C++17 with no header, so that NVRTC and a host compiler read the same text. Float32 subnormals may be flushed
// to zero (CuPy compiles with -ftz=true); every other rounding is to nearest even. Where a product and a sum are to be
// one rounding, `fmaf` says so; where they are to be two, `__fmul_rn` and `__fadd_rn` do.

struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

constexpr int LANES = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int PIECE = 8;  // consecutive elements that one thread handles at a time

__device__ inline float value(float stored) { return stored; }

__device__ inline float value(bfloat16 stored) { return __uint_as_float((unsigned)stored.bits << 16); }

__device__ inline float value(float16 stored) {
  const unsigned rebias = (127 - 15) << 23, smallest = (127 - 14) << 23;
  const unsigned sign = (stored.bits & 0x8000u) << 16, magnitude = (stored.bits & 0x7fffu) << 13;
  unsigned bits = magnitude + rebias;
  if (magnitude >= 0x7c00u << 13) bits += rebias;  // infinity or NaN: the exponent is all ones in float32 too
  if (magnitude < 0x0400u << 13) {
    // a subnormal is a multiple of 2^-24: beside 2^-14 it is a float32 fraction, and the difference is exact
    bits = __float_as_uint(__uint_as_float(magnitude + smallest) - __uint_as_float(smallest));
  }
  return __uint_as_float(bits | sign);
}

// The nearest stored number, ties to even; NaN stays NaN.
template <typename T>
__device__ T nearest(float x);

template <>
__device__ inline float nearest<float>(float x) {
  return x;
}

template <>
__device__ inline bfloat16 nearest<bfloat16>(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {(unsigned short)(bits >> 16 | 0x40u)};
  return {(unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
__device__ inline float16 nearest<float16>(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520, halfway from the largest number to the next power of two
    rounded = 0x7c00u;
  } else if (magnitude < (127 - 14) << 23) {
    // added to 0.5, whose last bit is 2^-24, the hardware rounds to the multiples of 2^-24 that subnormals are
    rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  } else {
    rounded = (magnitude - ((127 - 15) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {(unsigned short)(rounded | sign)};
}

// Sixteen bytes that are read or written by one instruction.
template <typename T>
struct alignas(16) Vector {
  static constexpr int COUNT = 16 / sizeof(T);
  T element[COUNT];
};

// Whether vectors may be read from here.
template <typename T>
__device__ bool aligned(const T* address) {
  return (reinterpret_cast<unsigned long long>(address) & 15u) == 0;
}

// Elements first .. first + 7 of a row of n; past its end, zero.
template <typename T>
__device__ void load(const T* row, int first, int n, float (&piece)[PIECE]) {
  if (first + PIECE <= n && aligned(row + first)) {
    constexpr int COUNT = Vector<T>::COUNT;
    const Vector<T>* vectors = reinterpret_cast<const Vector<T>*>(row + first);
#pragma unroll
    for (int v = 0; v < PIECE / COUNT; v++) {
      const Vector<T> vector = vectors[v];
#pragma unroll
      for (int i = 0; i < COUNT; i++) piece[v * COUNT + i] = value(vector.element[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < PIECE; i++) piece[i] = first + i < n ? value(row[first + i]) : 0.0f;
  }
}

// Round a piece into elements first .. first + 7 of a row of n.
template <typename T>
__device__ void store(T* row, int first, int n, const float (&piece)[PIECE]) {
  if (first + PIECE <= n && aligned(row + first)) {
    constexpr int COUNT = Vector<T>::COUNT;
    Vector<T>* vectors = reinterpret_cast<Vector<T>*>(row + first);
#pragma unroll
    for (int v = 0; v < PIECE / COUNT; v++) {
      Vector<T> vector;
#pragma unroll
      for (int i = 0; i < COUNT; i++) vector.element[i] = nearest<T>(piece[v * COUNT + i]);
      vectors[v] = vector;
    }
  } else {
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
      if (first + i < n) row[first + i] = nearest<T>(piece[i]);
    }
  }
}

// The sum over the 32 lanes of a full warp, the same bits in every lane: pairs at distance 16, then 8, 4, 2, 1.
__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}
