// SPDX-License-Identifier: Apache-2.0
// ROUTE-2 to ROUTE-4: the k experts of every token and their weights.

constexpr int MOST_EXPERTS = 256;
constexpr int EXPERTS_PER_LANE = MOST_EXPERTS / LANES;

// An integer that orders floats as numbers: -0 as +0, NaN below everything, and never 0. No arithmetic, so that
// flushing subnormals cannot make two logits equal.
__device__ inline unsigned rank_of(float x) {
  unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 1;
  if (bits == 0x80000000u) bits = 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// logits T[tokens, experts]   chosen int[tokens, k]   weights float[tokens, k]
//
// The experts of the k largest logits, largest first, of equal ones the lower id first; the softmax over those k.
// experts up to 256, k up to 32 and up to experts. NaN comes last, as in NumPy's sort.
// One warp per token; each slot is one reduction over the warp. Deterministic: the k exponentials are added in slot
// order.   Grid: one block per blockDim.x / 32 tokens.
template <typename T>
__global__ void __launch_bounds__(128)
    route(const T* logits, int* chosen, float* weights, int tokens, int experts, int k) {
  const int lane = threadIdx.x % LANES;
  const int token = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
  if (token >= tokens) return;  // a whole warp
  const T* row = logits + (long long)token * experts;
  unsigned ranks[EXPERTS_PER_LANE];
#pragma unroll
  for (int i = 0; i < EXPERTS_PER_LANE; i++) {
    const int expert = lane + i * LANES;
    ranks[i] = expert < experts ? rank_of(value(row[expert])) : 0;
  }

  float logit = 0.0f;  // of the expert in slot `lane`
  for (int slot = 0; slot < k; slot++) {
    unsigned long long best = 0;  // the rank, and below it the id inverted: of equal ranks the lower id is larger
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) {
      const unsigned long long candidate = (unsigned long long)ranks[i] << 32 | ~(unsigned)(lane + i * LANES);
      if (candidate > best) best = candidate;
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
      const unsigned long long other = __shfl_xor_sync(ALL_LANES, best, distance);
      if (other > best) best = other;
    }
    const int expert = ~(unsigned)best;
#pragma unroll
    for (int i = 0; i < EXPERTS_PER_LANE; i++) {
      if (expert == lane + i * LANES) ranks[i] = 0;
    }
    if (lane == slot) {
      logit = value(row[expert]);
      chosen[(long long)token * k + slot] = expert;
    }
  }

  const float exponential = expf(logit - __shfl_sync(ALL_LANES, logit, 0));
  float total = 0.0f;
  for (int slot = 0; slot < k; slot++) total += __shfl_sync(ALL_LANES, exponential, slot);
  if (lane < k) weights[(long long)token * k + lane] = exponential / total;
}
