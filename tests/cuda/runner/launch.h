// A launch from Python: check the arguments against the kernel's parameters, run every block, catch what goes wrong.
#pragma once

namespace runner {

// As in runner/module.py, field by field.
struct Argument {
  void* value;  // its address, as cuLaunchKernel takes it
  int pointer, kind, size;  // whether an array; 'f', 'i', 'u' or another; bytes of the number or element
};
struct Launch {
  unsigned grid[3], block[3];
  int order, flush;  // flush: float32 subnormals are zero, in and out
  uint64_t seed;
  Argument* arguments;
  int count, seconds;  // seconds of computing after which it counts as hanging
  char message[512];
  void* fault;  // the address of a memory fault
};

template <class T>
constexpr int kind_of() {
  return std::is_floating_point_v<T> ? 'f' : std::is_unsigned_v<T> ? 'u' : std::is_integral_v<T> ? 'i' : 'x';
}

template <class Parameter>
void check(int i, const Argument& given) {
  constexpr bool pointer = std::is_pointer_v<Parameter>;
  using Number = std::remove_cv_t<std::remove_pointer_t<Parameter>>;
  constexpr int kind = kind_of<Number>(), size = sizeof(Number);
  if (given.pointer != pointer || given.size != size || (kind != 'x' && given.kind != kind)) {
    fail("argument %d is %s%c%d, but the kernel wants %s%c%d", i, given.pointer ? "array of " : "", given.kind,
         given.size, pointer ? "array of " : "", kind, size);
  }
}

inline sigjmp_buf trap;
inline volatile sig_atomic_t caught = 0;
inline void* volatile fault_address = nullptr;
constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGVTALRM};
constexpr int SIGNAL_COUNT = sizeof SIGNALS / sizeof *SIGNALS;

inline void on_signal(int number, siginfo_t* info, void*) {
  caught = number;
  fault_address = info->si_addr;
  siglongjmp(trap, 1);
}

inline const char* meaning(int number) {
  switch (number) {
    case SIGSEGV: case SIGBUS: return "memory fault";
    case SIGFPE: return "integer division by zero";
    case SIGILL: case SIGTRAP: return "undefined behaviour";
    case SIGVTALRM: return "does not end";
    default: return "abort";
  }
}

inline void run_grid(const Launch& launch) {
  const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
  std::vector<int> sequence(blocks);
  for (unsigned b = 0; b < blocks; b++) sequence[b] = (int)b;
  if (launch.order == DESCENDING) std::reverse(sequence.begin(), sequence.end());
  if (launch.order == RANDOM) shuffle(sequence);
  for (int b : sequence) {
    const unsigned block = (unsigned)b;
    blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / (gridDim.x * gridDim.y)};
    run_block((Order)launch.order);
    if (message[0]) return;
  }
}

// With our signal handlers on a stack of their own, an alarm, and the processor flushing subnormals if asked to.
inline void run_guarded(Launch& launch) {
  static char alternate[64 << 10];
  stack_t stack = {}, old_stack;
  stack.ss_sp = alternate;
  stack.ss_size = sizeof alternate;
  sigaltstack(&stack, &old_stack);
  struct sigaction action = {}, old[SIGNAL_COUNT];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  for (int i = 0; i < SIGNAL_COUNT; i++) sigaction(SIGNALS[i], &action, &old[i]);
  const itimerval alarm = {{0, 0}, {launch.seconds, 0}}, off = {};
  setitimer(ITIMER_VIRTUAL, &alarm, nullptr);
#if defined(__SSE2__)
  const unsigned control = _mm_getcsr();
  if (launch.flush) _mm_setcsr(control | 0x8040);
#endif
  if (!sigsetjmp(trap, 1)) {
    run_grid(launch);
  } else {
    fail("%s in block (%u, %u, %u), thread %d", meaning(caught), blockIdx.x, blockIdx.y, blockIdx.z, current);
    launch.fault = fault_address;
  }
#if defined(__SSE2__)
  _mm_setcsr(control);
#endif
  setitimer(ITIMER_VIRTUAL, &off, nullptr);
  for (int i = 0; i < SIGNAL_COUNT; i++) sigaction(SIGNALS[i], &old[i], nullptr);
  sigaltstack(&old_stack, nullptr);
}

template <class... P, size_t... I>
void run(void (*kernel)(P...), Launch& launch, std::index_sequence<I...>) {
  message[0] = 0;
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  threads = (int)(blockDim.x * blockDim.y * blockDim.z);
  random_state = launch.seed;
  if (!threads || threads > MOST_THREADS || !gridDim.x || !gridDim.y || !gridDim.z) fail("no such grid or block");
  if (launch.count != (int)sizeof...(P)) fail("%d arguments, but the kernel has %d", launch.count, (int)sizeof...(P));
  if (!message[0]) (check<P>((int)I, launch.arguments[I]), ...);
  if (!message[0]) {
    for (int t = 0; t < threads; t++) {
      const unsigned i = (unsigned)t;
      index_of[t] = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    }
    struct Call {
      void (*kernel)(P...);
      Argument* arguments;
    } call = {kernel, launch.arguments};
    body_argument = &call;
    body = [](void* argument) {
      const Call& call = *static_cast<Call*>(argument);
      call.kernel(*static_cast<P*>(call.arguments[I].value)...);
    };
    run_guarded(launch);
    drop_unfinished();
  }
  memcpy(launch.message, message, sizeof message);
}

template <class... P>
void run(void (*kernel)(P...), Launch& launch) {
  run(kernel, launch, std::index_sequence_for<P...>());
}

}  // namespace runner

#define EXPORT(number, ...) \
  extern "C" __attribute__((visibility("default"))) void launch_##number(runner::Launch* launch) { \
    runner::run(__VA_ARGS__, *launch); \
  }
