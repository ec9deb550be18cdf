// SPDX-License-Identifier: Apache-2.0
// ROPE-3 to ROPE-5: rotary position embedding.

// x T[tokens, heads, 2 half]   cosine, sine float[tokens, half]   out T[tokens, heads, 2 half]
//
// The pair (a, b) of elements i and i + half becomes (a cos - b sin, b cos + a sin), each product and each sum rounded
// to float32, and the result to T. The table comes from the host, which has accurate sines and cosines of large angles.
// Grid: one thread per 8 pairs of one head.
template <typename T>
__global__ void __launch_bounds__(256)
    rotate(const T* x, const float* cosine, const float* sine, T* out, int tokens, int heads, int half) {
  const int per_head = (half + PIECE - 1) / PIECE;
  const long long piece = (long long)blockIdx.x * blockDim.x + threadIdx.x, head = piece / per_head;
  const long long token = head / heads;
  if (token >= tokens) return;
  const int first = (int)(piece % per_head) * PIECE;
  const T* from = x + head * 2 * half;
  float a[PIECE], b[PIECE], c[PIECE], s[PIECE], turned_a[PIECE], turned_b[PIECE];
  load(from, first, half, a);
  load(from + half, first, half, b);
  load(cosine + token * half, first, half, c);
  load(sine + token * half, first, half, s);
#pragma unroll
  for (int i = 0; i < PIECE; i++) {
    turned_a[i] = __fsub_rn(__fmul_rn(a[i], c[i]), __fmul_rn(b[i], s[i]));
    turned_b[i] = __fadd_rn(__fmul_rn(b[i], c[i]), __fmul_rn(a[i], s[i]));
  }
  T* to = out + head * 2 * half;
  store(to, first, half, turned_a);
  store(to + half, first, half, turned_b);
}
