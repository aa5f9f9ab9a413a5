// The scheduler of cuda_on_cpu.h: fibers, barriers, exchanges within warps.

#include "cuda/launch.cuh"  // which includes cuda_on_cpu.h

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Where this library's own variables lie, shared memory among them.
extern "C" __attribute__((visibility("hidden"))) char __bss_start, _end;

namespace cuda_on_cpu {

uint3 thread_index, block_index, block_size, grid_size;
int64_t processors = 1;

namespace {

constexpr size_t kStack = 128 * 1024;
enum State { kReady, kAtBarrier, kInWarp, kDone };

// Entered through a ucontext, afterwards by the compiler's own jumps: they ask nothing of the system, where swapcontext
// sets signal masks, nor of AddressSanitizer, which takes every longjmp for the end of many frames.
struct Context {
  ucontext_t entry;
  void* jump[5];
  bool entered = false;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  State state = kDone;
  uint64_t lanes[32];  // what its last exchange brought
};

struct Warp {
  uint64_t lanes[32];
  unsigned arrived = 0, mask = 0;
};

std::mutex one_launch;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<char> shared;
const std::function<void()>* kernel;
Context scheduler;
int current;
std::string failure;
unsigned blocks_run;
std::mt19937 shuffler;

__attribute__((noinline)) void leave_for(Context* to) {
  if (to->entered) __builtin_longjmp(to->jump, 1);
  setcontext(&to->entry);
}

__attribute__((noinline)) void jump(Context* from, Context* to) {
  from->entered = true;
  if (!__builtin_setjmp(from->jump)) leave_for(to);
}

// AddressSanitizer has to be told which stack is in use.
void switch_context(Context* from, Context* to, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack, size);
  jump(from, to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  jump(from, to);
#endif
}

const void* scheduler_stack;
size_t scheduler_size;

void back_to_scheduler(State state) {
  Fiber& self = *fibers[current];
  self.state = state;
  switch_context(&self.context, &scheduler, scheduler_stack, scheduler_size);
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  for (;;) {
    (*kernel)();
    back_to_scheduler(kDone);
  }
}

void resume(int thread) {
  current = thread;
  thread_index = {static_cast<unsigned>(thread), 0, 0};
  Fiber& fiber = *fibers[thread];
  switch_context(&scheduler, &fiber.context, fiber.stack.get(), kStack);
}

void make_fibers(int threads) {
  while (static_cast<int>(fibers.size()) < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers.back();
    ucontext_t& entry = fiber.context.entry;
    getcontext(&entry);
    entry.uc_stack.ss_sp = fiber.stack.get();
    entry.uc_stack.ss_size = kStack;
    entry.uc_link = nullptr;
    makecontext(&entry, fiber_main, 0);
  }
}

std::string threads_in(int threads, State state) {
  std::string names;
  for (int i = 0; i < threads; ++i) {
    if (fibers[i]->state != state) continue;
    if (names.size() > 40) return names + " ...";
    names += " " + std::to_string(i);
  }
  return names.empty() ? " none" : names;
}

// After each turn of all threads that could run: opens the barrier if all stand at it. False when the block is done.
bool next_turn(int threads) {
  int counts[4] = {};
  for (int i = 0; i < threads; ++i) ++counts[fibers[i]->state];
  if (counts[kDone] == threads) return false;
  if (counts[kReady]) return true;
  if (counts[kAtBarrier] == threads) {
    for (int i = 0; i < threads; ++i) fibers[i]->state = kReady;
    return true;
  }
  failure = "in block " + std::to_string(block_index.x) + ", not all threads come to the same place: at __syncthreads" +
            threads_in(threads, kAtBarrier) + "; in a warp's exchange" + threads_in(threads, kInWarp) + "; returned" +
            threads_in(threads, kDone);
  return false;
}

void run_block(int threads) {
  for (Warp& warp : warps) warp.arrived = 0;
  for (int i = 0; i < threads; ++i) fibers[i]->state = kReady;
  std::fill(shared.begin(), shared.end(), static_cast<char>(0xff));  // NaN as floats
  const bool backwards = blocks_run++ % 2;
  do {
    for (int i = 0; i < threads && failure.empty(); ++i) {
      const int thread = backwards ? threads - 1 - i : i;
      if (fibers[thread]->state == kReady) resume(thread);
    }
  } while (failure.empty() && next_turn(threads));
}

}  // namespace

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  make_fibers(threads);
  warps.assign((threads + 31) / 32, Warp{});
  shared.assign(shared_bytes, 0);
  kernel = &thread;
  block_size = {static_cast<unsigned>(threads), 1, 1};
  grid_size = {static_cast<unsigned>(blocks), 1, 1};
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), shuffler);
  for (const unsigned block : order) {
    block_index = {block, 0, 0};
    run_block(threads);
    if (!failure.empty()) break;
  }
  if (failure.empty()) return;
  fibers.clear();  // stuck in the middle of the kernel
  throw std::runtime_error(std::exchange(failure, ""));
}

void* dynamic_shared() { return shared.data(); }

void wait_for_block() { back_to_scheduler(kAtBarrier); }

void must_be_device_memory(const void* address) {
  const char* at = static_cast<const char*>(address);
  const bool is_static = at >= &__bss_start && at < &_end;
  if (!is_static && !(at >= shared.data() && at < shared.data() + shared.size())) return;
  failure = "thread " + std::to_string(current) + " stores to shared memory with an instruction for device memory";
  back_to_scheduler(kDone);
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  Warp& warp = warps[current / 32];
  const int lane = current % 32;
  const bool wrong = !(mask >> lane & 1) || (warp.arrived && mask != warp.mask) || (warp.arrived >> lane & 1);
  if (wrong) {
    failure = "thread " + std::to_string(current) + " comes to a warp's exchange with a mask that is not the others'";
    back_to_scheduler(kInWarp);
  }
  warp.mask = mask;
  warp.arrived |= 1u << lane;
  warp.lanes[lane] = value;
  if (warp.arrived != mask) {
    back_to_scheduler(kInWarp);
    return fibers[current]->lanes;
  }
  warp.arrived = 0;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    Fiber& fiber = *fibers[current - lane + i];
    std::copy(std::begin(warp.lanes), std::end(warp.lanes), fiber.lanes);
    fiber.state = kReady;
  }
  return fibers[current]->lanes;
}

}  // namespace cuda_on_cpu

// From now on there are so many multiprocessors, and blocks come in the orders that belong to this seed.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_start(int64_t processors, unsigned seed) {
  cuda_on_cpu::processors = processors;
  cuda_on_cpu::shuffler.seed(seed);
}
