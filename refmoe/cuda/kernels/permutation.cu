// SPDX-License-Identifier: Apache-2.0
// The stable counting sort of (token, slot) pairs by expert, in three kernels: histogram, scan, scatter.
//
// Deterministic: every position is computed, none is handed out by an atomic operation on global memory.

constexpr int MOST_EXPERTS = 256;
constexpr int PAIRS = 256;  // pairs per block: one a thread
constexpr int WARPS = PAIRS / LANES;

// chosen int[pairs]   counts int[experts, blocks]
//
// counts[e, b] = how many of the pairs of block b, 256 b .. 256 b + 255, chose expert e. Ids are in 0 .. experts - 1,
// experts up to 256.   Grid: one block per 256 pairs, at least one; blocks is the grid.
__global__ void __launch_bounds__(PAIRS) count_pairs(const int* chosen, int* counts, int pairs, int experts, int blocks) {
  __shared__ int tally[MOST_EXPERTS];
  for (int e = threadIdx.x; e < experts; e += PAIRS) tally[e] = 0;
  __syncthreads();
  const int pair = blockIdx.x * PAIRS + threadIdx.x;
  if (pair < pairs) atomicAdd(&tally[chosen[pair]], 1);  // integers: the order does not matter
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += PAIRS) counts[e * blocks + blockIdx.x] = tally[e];
}

// counts int[experts, blocks], changed in place   offsets int[experts + 1]
//
// counts becomes its exclusive prefix sum, row after row: where the pairs of block b that chose expert e begin.
// offsets[e] is where expert e begins, offsets[experts] the number of pairs.   Grid: one block.
__global__ void __launch_bounds__(PAIRS) scan_counts(int* counts, int* offsets, int experts, int blocks) {
  __shared__ int total_of_warp[WARPS];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int n = experts * blocks, each = (n + PAIRS - 1) / PAIRS;
  const int first = min(n, (int)threadIdx.x * each), last = min(n, first + each);
  int own = 0;
  for (int i = first; i < last; i++) own += counts[i];

  int through = own;  // the sum through this lane, then through this thread
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    const int before = __shfl_up_sync(ALL_LANES, through, distance);
    if (lane >= distance) through += before;
  }
  if (lane == LANES - 1) total_of_warp[warp] = through;
  __syncthreads();
  for (int w = 0; w < warp; w++) through += total_of_warp[w];

  int start = through - own;
  for (int i = first; i < last; i++) {
    const int count = counts[i];
    counts[i] = start;
    if (i % blocks == 0) offsets[i / blocks] = start;
    start += count;
  }
  if (threadIdx.x == PAIRS - 1) offsets[experts] = start;
}

// chosen int[pairs]   starts int[experts, blocks], as `scan_counts` leaves it   order, position int[pairs]
//
// order = the pairs sorted by expert, pairs of one expert in the order they had; position is its inverse:
// order[position[p]] = p.   Grid: as for `count_pairs`.
__global__ void __launch_bounds__(PAIRS)
    place_pairs(const int* chosen, const int* starts, int* order, int* position, int pairs, int experts, int blocks) {
  __shared__ int tally[WARPS][MOST_EXPERTS];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  for (int e = lane; e < experts; e += LANES) tally[warp][e] = 0;
  __syncwarp();
  const int pair = blockIdx.x * PAIRS + threadIdx.x;
  const int expert = pair < pairs ? chosen[pair] : -1;
  const unsigned same = __match_any_sync(ALL_LANES, expert);
  const int rank = __popc(same & ((1u << lane) - 1u));  // how many lower lanes chose the same expert
  if (expert >= 0 && rank == 0) tally[warp][expert] = __popc(same);
  __syncthreads();
  if (expert < 0) return;
  int place = starts[expert * blocks + blockIdx.x] + rank;
  for (int w = 0; w < warp; w++) place += tally[w][expert];
  order[place] = pair;
  position[pair] = place;
}
