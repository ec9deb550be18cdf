// One fiber per thread of a block: where it is, what it waits for, how to switch to it.
#pragma once

namespace runner {

enum class State : uint8_t { READY, AT_BARRIER, IN_COLLECTIVE, DONE };

struct Place {
  int line, site;  // the line is for messages; the site tells two waits on one line apart
};

struct Fiber {
  jmp_buf context;
  void* stack = nullptr;
  State state = State::DONE;
  Place place = {};
  unsigned mask = 0;       // of the collective that it waits in
  uint64_t published = 0;  // its own value for that collective
  uint64_t received = 0;   // its value as the other lanes read it, fixed when all have come
};

constexpr int LANES_OF_WARP = 32;
constexpr int MOST_THREADS = 1024;
constexpr size_t PAGE = 4096, STACK = 128 << 10;

inline Fiber fibers[MOST_THREADS];
inline uint3 index_of[MOST_THREADS];
inline int current = 0;
inline jmp_buf scheduler;
inline void (*body)(void*) = nullptr;  // the kernel with its arguments
inline void* body_argument = nullptr;

// Back to the scheduler, until it resumes this fiber. Never inlined: the kernel's own variables must stay on the
// fiber's stack, where setjmp cannot lose them.
__attribute__((noinline)) inline void wait() {
  if (!_setjmp(fibers[current].context)) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  for (;;) {  // once per block
    body(body_argument);
    fibers[current].state = State::DONE;
    wait();
  }
}

// A stack whose lowest page is inaccessible, entered at `fiber_main`.
inline void enter_new_stack(Fiber& fiber) {
  fiber.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  mprotect(fiber.stack, PAGE, PROT_NONE);
  static ucontext_t entry;
  getcontext(&entry);
  entry.uc_stack.ss_sp = fiber.stack;
  entry.uc_stack.ss_size = STACK;
  entry.uc_link = nullptr;
  makecontext(&entry, fiber_main, 0);
  setcontext(&entry);  // slow, so only to enter a stack; between fibers, setjmp and longjmp
}

// Run a thread until it waits or is done.
__attribute__((noinline)) inline void resume(int thread) {
  current = thread;
  threadIdx = index_of[thread];
  if (_setjmp(scheduler)) return;
  if (fibers[thread].stack) _longjmp(fibers[thread].context, 1);
  enter_new_stack(fibers[thread]);
}

// Forget fibers that a failed launch left in the middle of a kernel.
inline void drop_unfinished() {
  for (Fiber& fiber : fibers) {
    if (fiber.state != State::DONE && fiber.stack) {
      munmap(fiber.stack, STACK);
      fiber.stack = nullptr;
    }
    fiber.state = State::DONE;
  }
}

}  // namespace runner
