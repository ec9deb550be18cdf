// SPDX-License-Identifier: Apache-2.0
// EXPERT-2: the gated activation of rows that a matrix product has left.

// gate, up, out T[n]
//
// out = gate / (1 + exp(-gate)) * up in float32, rounded to T.   Grid: one thread per 8 elements.
template <typename T>
__global__ void __launch_bounds__(256) swiglu(const T* gate, const T* up, T* out, long long n) {
  const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PIECE;
  if (first >= n) return;
  const int count = (int)min((long long)PIECE, n - first);
  float gates[PIECE], ups[PIECE];
  load(gate + first, 0, count, gates);
  load(up + first, 0, count, ups);
#pragma unroll
  for (int i = 0; i < PIECE; i++) gates[i] = gates[i] / (1.0f + expf(-gates[i])) * ups[i];
  store(out + first, 0, count, gates);
}
