// SPDX-License-Identifier: Apache-2.0
// The chosen experts of a few tokens, straight from the weights of all: each weight is read once, nothing is copied.
//
// For decoding, where the time is that of reading the weights. Float32 sums. Rows of any length; 16-byte loads where a
// row is aligned. A block has several warps, and each warp computes one element: grid (outputs / warps, tokens k).

// The dot products of ROWS rows of weights with x, all [n]; the same bits in every lane of a full warp.
//
// Lane l takes the pieces of 8 elements l, l + 32, .. in order, one fused multiply-add an element, and the lanes are
// added by `sum_of_warp`. So the bits depend on n and the values, not on alignment.
template <int ROWS, typename W>
__device__ void dots_of_warp(const W* const (&rows)[ROWS], const float* x, int n, float (&sums)[ROWS]) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;
#pragma unroll 2
  for (int first = threadIdx.x % LANES * PIECE; first < n; first += LANES * PIECE) {
    float factors[PIECE], weights[ROWS][PIECE];
#pragma unroll
    for (int r = 0; r < ROWS; r++) load(rows[r], first, n, weights[r]);
    load(x, first, n, factors);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int i = 0; i < PIECE; i++) sums[r] = fmaf(weights[r][i], factors[i], sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) sums[r] = sum_of_warp(sums[r]);
}

// w1, w3 W[experts, outputs, inputs]   x float[tokens, inputs]   chosen int[tokens, k]
// gate, up, hidden float[tokens, k, outputs]
//
// EXPERT-1 and EXPERT-2 for slot s of token t, with e = chosen[t, s]: gate = w1[e] x[t], up = w3[e] x[t],
// hidden = gate / (1 + exp(-gate)) * up. All three are written: they are small beside the weights.
template <typename W>
__global__ void __launch_bounds__(256) expert_hidden(const W* w1, const W* w3, const float* x, const int* chosen,
                                                     float* gate, float* up, float* hidden, int inputs, int outputs,
                                                     int k) {
  const int output = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
  if (output >= outputs) return;  // a whole warp
  const long long pair = blockIdx.y, row = ((long long)chosen[pair] * outputs + output) * inputs;
  const W* const rows[2] = {w1 + row, w3 + row};
  float sums[2];
  dots_of_warp(rows, x + pair / k * inputs, inputs, sums);
  if (threadIdx.x % LANES == 0) {
    const long long at = pair * outputs + output;
    gate[at] = sums[0];
    up[at] = sums[1];
    hidden[at] = sums[0] / (1.0f + expf(-sums[0])) * sums[1];
  }
}

// w2 W[experts, outputs, inputs]   hidden float[tokens, k, inputs]   chosen int[tokens, k]
// output float[tokens, k, outputs]
//
// EXPERT-1: output[t, s] = w2[chosen[t, s]] hidden[t, s], not yet weighted.
template <typename W>
__global__ void __launch_bounds__(256) expert_output(const W* w2, const float* hidden, const int* chosen, float* output,
                                                     int inputs, int outputs) {
  const int at = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
  if (at >= outputs) return;  // a whole warp
  const long long pair = blockIdx.y;
  const W* const rows[1] = {w2 + ((long long)chosen[pair] * outputs + at) * inputs};
  float sums[1];
  dots_of_warp(rows, hidden + pair * inputs, inputs, sums);
  if (threadIdx.x % LANES == 0) output[pair * outputs + at] = sums[0];
}
