// The schedule of one block: who runs next, and when those who wait may go on.
#pragma once

namespace runner {

enum Order { ABREAST, DESCENDING, RANDOM };
// ABREAST: all threads from 0 up, each to its next wait, and again. DESCENDING: warp after warp from the last to the
// first, lanes too, each warp as far as it gets alone. RANDOM: a mixture of both, in an order drawn anew each time.

inline char message[512];  // why a launch failed; empty while it has not
inline int threads = 0;    // of the block
inline uint64_t random_state = 0;

template <class... A>
void fail(const char* format, A... arguments) {
  if (!message[0]) snprintf(message, sizeof message, format, arguments...);
}

inline unsigned draw(unsigned below) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (unsigned)((random_state >> 33) % below);
}

inline void shuffle(std::vector<int>& order) {
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw((unsigned)i)]);
}

// Let the lanes go whose whole mask waits in the same collective. Returns whether any did.
inline bool release_warp(int first) {
  bool released = false;
  for (int thread = first; thread < std::min(first + LANES_OF_WARP, threads); thread++) {
    const Fiber& fiber = fibers[thread];
    if (fiber.state != State::IN_COLLECTIVE) continue;
    const unsigned mask = fiber.mask;
    if (!(mask >> (thread - first) & 1)) {
      fail("line %d: thread %d is not in the mask of its own collective", fiber.place.line, thread);
      return false;
    }
    bool complete = true;
    for (int lane = 0; lane < LANES_OF_WARP; lane++) {
      if (!(mask >> lane & 1)) continue;
      const Fiber& other = fibers[std::min(first + lane, MOST_THREADS - 1)];
      if (first + lane >= threads || other.state == State::DONE) {
        fail("line %d: thread %d waits for lane %d, which has exited or is not there", fiber.place.line, thread, lane);
        return false;
      }
      complete &= other.state == State::IN_COLLECTIVE && other.place.site == fiber.place.site && other.mask == mask;
    }
    if (!complete) continue;
    for (int lane = 0; lane < LANES_OF_WARP; lane++) {
      if (!(mask >> lane & 1)) continue;
      fibers[first + lane].received = fibers[first + lane].published;
      fibers[first + lane].state = State::READY;
    }
    released = true;
  }
  return released;
}

// Let the whole block go on from its barrier. All its threads must be there, at the same one: that a GPU counts
// threads that have returned as arrived is not relied on.
inline void release_block() {
  int waiting = -1;
  for (int t = 0; t < threads; t++) {
    if (fibers[t].state == State::IN_COLLECTIVE) {
      return fail("line %d: thread %d waits for lanes that wait elsewhere", fibers[t].place.line, t);
    }
    if (fibers[t].state == State::AT_BARRIER) waiting = t;
  }
  if (waiting < 0) return;
  const Place place = fibers[waiting].place;
  for (int t = 0; t < threads; t++) {
    if (fibers[t].state == State::DONE) {
      return fail("line %d: thread %d waits at a barrier, but thread %d has exited", place.line, waiting, t);
    }
    if (fibers[t].place.site != place.site) {
      return fail("line %d: thread %d waits at a barrier, but thread %d at that of line %d", place.line, waiting, t,
                  fibers[t].place.line);
    }
  }
  for (int t = 0; t < threads; t++) fibers[t].state = State::READY;
}

// One warp, as far as it gets without the others.
inline void run_warp(int first, bool descending, int rotation) {
  do {
    for (int i = 0; i < LANES_OF_WARP; i++) {
      const int lane = descending ? LANES_OF_WARP - 1 - i : (i + rotation) % LANES_OF_WARP;
      if (first + lane < threads && fibers[first + lane].state == State::READY) resume(first + lane);
    }
  } while (release_warp(first) && !message[0]);
}

inline void run_warps(Order order) {
  std::vector<int> warps;
  for (int first = 0; first < threads; first += LANES_OF_WARP) warps.push_back(first);
  if (order == DESCENDING) std::reverse(warps.begin(), warps.end());
  if (order == RANDOM) shuffle(warps);
  for (int first : warps) {
    if (!message[0]) run_warp(first, order == DESCENDING, order == RANDOM ? (int)draw(LANES_OF_WARP) : 0);
  }
}

inline void run_abreast(Order order) {
  static std::vector<int> sequence;
  sequence.resize(threads);
  for (int t = 0; t < threads; t++) sequence[t] = t;
  if (order == RANDOM) shuffle(sequence);
  for (int t : sequence) {
    if (fibers[t].state == State::READY) resume(t);
  }
  for (int first = 0; first < threads && !message[0]; first += LANES_OF_WARP) release_warp(first);
}

extern "C" char __start_shared_memory[] __attribute__((weak));
extern "C" char __stop_shared_memory[] __attribute__((weak));

// All threads of the block at blockIdx, to their end or to the first failure.
inline void run_block(Order order) {
  char *volatile start = __start_shared_memory, *volatile stop = __stop_shared_memory;
  if (start) memset(start, 0xCD, stop - start);  // what a kernel finds there before it writes is undefined
  for (int t = 0; t < threads; t++) fibers[t].state = State::READY;
  while (!message[0]) {
    if (order == ABREAST || (order == RANDOM && draw(2))) {
      run_abreast(order);
    } else {
      run_warps(order);
    }
    bool ready = false, done = true;
    for (int t = 0; t < threads; t++) {
      ready |= fibers[t].state == State::READY;
      done &= fibers[t].state == State::DONE;
    }
    if (done) return;
    if (!ready && !message[0]) release_block();
  }
}

}  // namespace runner
