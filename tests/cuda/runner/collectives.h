// Barriers and warp collectives: publish a value, wait for the lanes of the mask, read theirs.
#pragma once

namespace runner {

inline void barrier(Place place) {
  fibers[current].state = State::AT_BARRIER;
  fibers[current].place = place;
  wait();
}

// Returns the fibers of the warp, whose `received` may be read until this fiber waits again.
inline const Fiber* exchange(Place place, unsigned mask, uint64_t published) {
  Fiber& fiber = fibers[current];
  fiber.state = State::IN_COLLECTIVE;
  fiber.place = place;
  fiber.mask = mask;
  fiber.published = published;
  wait();
  return &fibers[current / LANES_OF_WARP * LANES_OF_WARP];
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr uint64_t POISON = 0x7ff7dead7fc0dead;  // a NaN as double and as float: what a lane outside the mask gives

// The value of lane `source`; one that the instruction calls out of range is the lane's own.
template <class T>
T shuffle_from(Place place, unsigned mask, T value, int source, bool in_range) {
  const Fiber* warp = exchange(place, mask, to_bits(value));
  const int lane = in_range ? source : current % LANES_OF_WARP;
  return from_bits<T>(mask >> lane & 1 ? warp[lane].received : POISON);
}

template <class T>
T shuffle_index(Place place, unsigned mask, T value, int source) {
  return shuffle_from(place, mask, value, source & (LANES_OF_WARP - 1), true);
}

template <class T>
T shuffle_up(Place place, unsigned mask, T value, unsigned distance) {
  const int source = current % LANES_OF_WARP - (int)distance;
  return shuffle_from(place, mask, value, source, source >= 0);
}

template <class T>
T shuffle_down(Place place, unsigned mask, T value, unsigned distance) {
  const int source = current % LANES_OF_WARP + (int)distance;
  return shuffle_from(place, mask, value, source, source < LANES_OF_WARP);
}

template <class T>
T shuffle_xor(Place place, unsigned mask, T value, int bits) {
  const int source = current % LANES_OF_WARP ^ bits;
  return shuffle_from(place, mask, value, source, source < LANES_OF_WARP);
}

// The lanes of the mask that published this value.
inline unsigned lanes_with(const Fiber* warp, unsigned mask, uint64_t value) {
  unsigned lanes = 0;
  for (int lane = 0; lane < LANES_OF_WARP; lane++) {
    if ((mask >> lane & 1) && warp[lane].received == value) lanes |= 1u << lane;
  }
  return lanes;
}

template <class T>
unsigned match_any(Place place, unsigned mask, T value) {
  return lanes_with(exchange(place, mask, to_bits(value)), mask, to_bits(value));
}

inline unsigned ballot(Place place, unsigned mask, bool predicate) {
  return lanes_with(exchange(place, mask, predicate), mask, 1);
}

}  // namespace runner

#define HERE (runner::Place{__LINE__, __COUNTER__})
#define __syncthreads() runner::barrier(HERE)
#define __syncwarp() ((void)runner::exchange(HERE, 0xffffffffu, 0))
#define __shfl_sync(mask, value, source) runner::shuffle_index(HERE, mask, value, source)
#define __shfl_up_sync(mask, value, distance) runner::shuffle_up(HERE, mask, value, distance)
#define __shfl_down_sync(mask, value, distance) runner::shuffle_down(HERE, mask, value, distance)
#define __shfl_xor_sync(mask, value, bits) runner::shuffle_xor(HERE, mask, value, bits)
#define __match_any_sync(mask, value) runner::match_any(HERE, mask, value)
#define __ballot_sync(mask, predicate) runner::ballot(HERE, mask, predicate)
