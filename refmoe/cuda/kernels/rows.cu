// SPDX-License-Identifier: Apache-2.0
// Rows into the order of experts, and the weighted sum back.

// x T[tokens, columns]   order int[pairs]   out T[pairs, columns]
//
// out[p] = x[order[p] / k], bit for bit: with the order of `place_pairs`, each expert's rows are consecutive.
// Vectors where both rows are aligned.   Grid: one block per pair.
template <typename T>
__global__ void __launch_bounds__(256) gather_rows(const T* x, const int* order, T* out, int columns, int k) {
  constexpr int COUNT = Vector<T>::COUNT;
  const T* from = x + (long long)(order[blockIdx.x] / k) * columns;
  T* to = out + (long long)blockIdx.x * columns;
  const int vectors = aligned(from) && aligned(to) ? columns / COUNT : 0;
  for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
    reinterpret_cast<Vector<T>*>(to)[v] = reinterpret_cast<const Vector<T>*>(from)[v];
  }
  for (int c = vectors * COUNT + threadIdx.x; c < columns; c += blockDim.x) to[c] = from[c];
}

// outputs T[pairs, columns], in the order of experts   position int[tokens, k]   weights float[tokens, k]
// out T[tokens, columns]
//
// COMBINE-1: out[t] = the sum over slots s = 0, 1, .. of weights[t, s] * outputs[position[t, s]], each product and each
// partial sum rounded to float32 in that order, and the last to T. No atomic operation: a token is one block's.
// Grid: one block per token.
template <typename T>
__global__ void __launch_bounds__(256)
    combine(const T* outputs, const int* position, const float* weights, T* out, int columns, int k) {
  const long long token = blockIdx.x;
  for (int first = threadIdx.x * PIECE; first < columns; first += blockDim.x * PIECE) {
    float sum[PIECE];
    for (int slot = 0; slot < k; slot++) {
      const float weight = weights[token * k + slot];
      float piece[PIECE];
      load(outputs + (long long)position[token * k + slot] * columns, first, columns, piece);
#pragma unroll
      for (int i = 0; i < PIECE; i++) {
        const float product = __fmul_rn(weight, piece[i]);
        sum[i] = slot ? __fadd_rn(sum[i], product) : product;
      }
    }
    store(out + token * columns, first, columns, sum);
  }
}
