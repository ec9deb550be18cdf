// SPDX-License-Identifier: Apache-2.0
// NORM-1 to NORM-3: root-mean-square normalisation.

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / LANES;

// x T[rows, columns]   gain T[columns]   out T[rows, columns]
//
// out = x / sqrt(mean(x^2) + eps) * gain in float32, rounded to T at the end. The squares are added by fused
// multiply-adds, thread i taking the pieces of 8 elements i, i + 256, .. in order; then the lanes of a warp; then the
// warps, first to last. So the bits depend on the values alone.   Grid: one block per row.
template <typename T>
__global__ void __launch_bounds__(THREADS) rms_norm(const T* x, const T* gain, T* out, int columns, float eps) {
  __shared__ float partial[WARPS];
  const T* row = x + (long long)blockIdx.x * columns;
  float sum = 0.0f;
  for (int first = threadIdx.x * PIECE; first < columns; first += THREADS * PIECE) {
    float piece[PIECE];
    load(row, first, columns, piece);
#pragma unroll
    for (int i = 0; i < PIECE; i++) sum = fmaf(piece[i], piece[i], sum);
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x % LANES == 0) partial[threadIdx.x / LANES] = sum;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) total += partial[w];
  const float root = sqrtf(total / (float)columns + eps);
  for (int first = threadIdx.x * PIECE; first < columns; first += THREADS * PIECE) {
    float piece[PIECE], gains[PIECE];
    load(row, first, columns, piece);
    load(gain, first, columns, gains);
#pragma unroll
    for (int i = 0; i < PIECE; i++) piece[i] = piece[i] / root * gains[i];
    store(out + (long long)blockIdx.x * columns, first, columns, piece);
  }
}
