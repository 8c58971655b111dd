#include "machine.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
namespace reft_cuda {
unsigned char (*dynamic_arena)[];
}

namespace emulation {

Machine machine;
Order order = Order::kForward;
std::minstd_rand generator;

unsigned threads_of_block() {
  return machine.grid.threads.x * machine.grid.threads.y * machine.grid.threads.z;
}

const char* name(Wait kind) {
  switch (kind) {
    case Wait::kBlock:
      return "__syncthreads()";
    case Wait::kCluster:
      return "this_cluster().sync()";
    case Wait::kGrid:
      return "this_grid().sync()";
    case Wait::kWarp:
      return "a warp's shuffle or __syncwarp()";
    case Wait::kTransfer:
      return "a wait for transfers";
    case Wait::kEnded:
      return "the kernel's end";
    default:
      return "nothing";
  }
}

std::string who(const Thread& thread) {
  const uint3& block = machine.blocks[thread.block].index;
  char text[96];
  snprintf(text, sizeof text, "thread %u of block (%u, %u, %u)", thread.number, block.x, block.y,
           block.z);
  return text;
}

namespace {

constexpr size_t kAlignment = 16;       // alignment of dynamic shared memory
constexpr unsigned char kGuard = 0xa5;  // bytes before and after it
// Fiber identities of ended threads that are kept. More would slow ThreadSanitizer down.
constexpr size_t kIdentities = 2048;

std::mutex one_launch;
unsigned char fill_byte = 0xff;

size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }
// Size of the inaccessible memory on either side of a block's shared memory. A larger size slows
// ThreadSanitizer down.
size_t fence() { return kRaces ? page() : 64 * page(); }
size_t round_up(size_t a, size_t b) { return (a + b - 1) / b * b; }

// Makes a thread the running one: kernels see its indices and its block's memory.
void enter(Thread& thread) {
  Block& block = machine.blocks[thread.block];
  machine.current = &thread;
  threadIdx = thread.index;
  blockIdx = block.index;
  reft_cuda::dynamic_arena = reinterpret_cast<unsigned char(*)[]>(block.shared);
}

Thread* take() {
  auto& ready = machine.ready;
  if (order == Order::kRandom) std::swap(ready[generator() % ready.size()], ready.back());
  Thread* thread = ready.back();
  ready.pop_back();
  return thread;
}

}  // namespace

// Called when the running thread waits or has ended. Switches to another thread, or to the host if
// none can run.
void next(bool ends) {
  Thread& from = *machine.current;
  if (machine.failed || machine.ready.empty()) {
    switch_to(from.fiber, machine.host, ends);
    return;
  }
  Thread& to = *take();
  if (&to == &from) return;
  enter(to);
  switch_to(from.fiber, to.fiber, ends);
}

[[noreturn]] void fail() {
  machine.failed = true;
  release(machine.end_object);
  for (;;) next(true);
}

void wake(Scope& scope) {
  for (unsigned k = 0; k < scope.count; ++k) {
    // taken from the back
    const unsigned at =
        order == Order::kReverse ? scope.first + k : scope.first + scope.count - 1 - k;
    machine.threads[at].waits = Wait::kNothing;
    machine.ready.push_back(&machine.threads[at]);
  }
}

namespace {

void check_guards(const Block& block) {
  const unsigned char *end = block.shared + machine.grid.shared,
                      *last = block.mapping + block.mapped - fence();
  const unsigned char* first = block.mapping + fence();
  const auto spoiled = [](unsigned char byte) { return byte != kGuard; };
  if (std::any_of(first, const_cast<const unsigned char*>(block.shared), spoiled) ||
      std::any_of(end, last, spoiled)) {
    report("block (%u, %u, %u) wrote outside its %zu bytes of dynamic shared memory", block.index.x,
           block.index.y, block.index.z, machine.grid.shared);
    machine.failed = true;
  }
}

// Called when no thread reads the block's shared memory any longer.
void end_block(Block& block) {
  unpoison(block.mapping + fence(), block.mapped - 2 * fence());
  check_guards(block);
  if (machine.grid.together == 1) return;
  acquire(block.scope.object);
  freed(block.shared, machine.grid.shared);
  mprotect(block.mapping, block.mapped, PROT_NONE);
}

void entry() {
  Thread& thread = *machine.current;
  arrived(thread.fiber);
  acquire(machine.start_object);
  machine.grid.body(machine.grid.arguments);
  thread.waits = Wait::kEnded;
  release(machine.end_object);
  Block& block = machine.blocks[thread.block];
  if (block.ended == 0) block.scope.object = new_object();
  release(block.scope.object);
  ++machine.ended;
  if (++block.ended == threads_of_block()) end_block(block);
  for (;;) next(true);
}

// Places the block's memory at the end of its pages.
void allot(Block& block) {
  const size_t bytes = machine.grid.shared;
  const size_t needed = round_up(std::max<size_t>(bytes, 1), page()) + 2 * fence();
  if (kRaces || block.mapped != needed) {
    if (block.mapped != 0 && !kRaces) unmap_memory(block.mapping, block.mapped);
    block.mapping = static_cast<unsigned char*>(map_memory(needed));
    block.mapped = needed;
  }
  unsigned char *first = block.mapping + fence(), *last = block.mapping + needed - fence();
  mprotect(first, size_t(last - first), PROT_READ | PROT_WRITE);
  mprotect(block.mapping, fence(), PROT_NONE);
  mprotect(last, fence(), PROT_NONE);
  block.shared = last - round_up(bytes, kAlignment);
  memset(first, kGuard, size_t(last - first));
  memset(block.shared, fill_byte, bytes);
  poison(first, size_t(block.shared - first));
  poison(block.shared + bytes, size_t(last - block.shared) - bytes);
}

void place(unsigned first_block) {
  const Grid& grid = machine.grid;
  const unsigned count = threads_of_block(), warps = (count + kWarpLanes - 1) / kWarpLanes,
                 together = unsigned(grid.together);
  machine.blocks.resize(together);
  machine.threads.resize(size_t(together) * count);
  machine.warps.assign(size_t(together) * warps, Scope());
  machine.group = {0, together * count, 0, {}, 0};
  machine.ended = 0;
  machine.ready.clear();
  machine.ready.reserve(machine.threads.size());
  for (unsigned b = 0; b < together; ++b) {
    Block& block = machine.blocks[b];
    const unsigned at = first_block + b;
    block.index = {at % grid.blocks.x, at / grid.blocks.x % grid.blocks.y,
                   at / grid.blocks.x / grid.blocks.y};
    block.ended = 0;
    for (Transfers& each : machine.transfers[b % kMaxCluster]) each.barrier = nullptr;
    block.scope = {b * count, count, 0, {}, 0};
    allot(block);
    for (unsigned w = 0; w < warps; ++w)
      machine.warps[b * warps + w] = {
          b * count + w * kWarpLanes, std::min(kWarpLanes, count - w * kWarpLanes), 0, {}, 0};
    for (unsigned t = 0; t < count; ++t) {
      Thread& thread = machine.threads[b * count + t];
      thread.number = t;
      thread.started = thread.groups = 0;
      thread.block = b;
      thread.index = {t % grid.threads.x, t / grid.threads.x % grid.threads.y,
                      t / grid.threads.x / grid.threads.y};
      start(thread.fiber, machine.first_stack + b * count + t, entry);
    }
  }
}

void report_deadlock() {
  std::string text;
  for (const Wait kind : {Wait::kWarp, Wait::kBlock, Wait::kCluster, Wait::kGrid, Wait::kTransfer,
                          Wait::kEnded}) {
    const auto at_it = [&](const Thread& thread) { return thread.waits == kind; };
    const auto first = std::find_if(machine.threads.begin(), machine.threads.end(), at_it);
    if (first == machine.threads.end()) continue;
    const auto count = std::count_if(machine.threads.begin(), machine.threads.end(), at_it);
    text += text.empty() ? "" : "; ";
    text += std::to_string(count) + " at " + name(kind) + " (" + who(*first);
    text += kind == Wait::kEnded ? ")"
                                 : std::string(", ") + first->site.file + ":" +
                                       std::to_string(first->site.line) + ")";
  }
  report("divergent threads, none can go on: %s", text.c_str());
}

// Ended threads keep their identity for a while, so that races of later blocks with them are
// detected.
void retire() {
  if (!kRaces) return;
  machine.first_stack += machine.threads.size();
  if (machine.first_stack + machine.threads.size() > kIdentities) machine.first_stack = 0;
  for (Block& block : machine.blocks) machine.spent.push_back(std::exchange(block, Block()));
}

bool run_together(unsigned first_block) {
  place(first_block);
  machine.start_object = new_object();
  release(machine.start_object);
  Scope everyone = machine.group;
  wake(everyone);
  Thread& first = *take();
  enter(first);
  switch_to(machine.host, first.fiber);
  if (!machine.failed && machine.ended != machine.threads.size()) {
    report_deadlock();
    machine.failed = true;
  }
  retire();
  return !machine.failed;
}

// A fault of a kernel ends its launch, not the process.
void on_fault(int number, siginfo_t* info, void*) {
  const auto at = static_cast<unsigned char*>(info->si_addr);
  const auto holds = [at](const Block& block) {
    return at >= block.mapping && at < block.mapping + block.mapped;
  };
  const auto owner = std::find_if(machine.blocks.begin(), machine.blocks.end(), holds);
  const std::string thread = who(*machine.current);
  if (number == SIGILL)
    report("%s made a misaligned access", thread.c_str());
  else if (owner == machine.blocks.end())
    report("%s touched address %p", thread.c_str(), static_cast<void*>(at));
  else if (owner->ended == threads_of_block())
    report("%s touched shared memory of block (%u, %u, %u), which has ended", thread.c_str(),
           owner->index.x, owner->index.y, owner->index.z);
  else
    report("%s touched memory outside the dynamic shared memory of block (%u, %u, %u)",
           thread.c_str(), owner->index.x, owner->index.y, owner->index.z);
  fail();
}

// Installs on_fault while a kernel runs. Sanitizers have handlers of their own.
class Faults {
 public:
  Faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int k = 0; k < 2; ++k) sigaction(kNumbers[k], &action, &before_[k]);
  }
  ~Faults() {
    for (int k = 0; k < 2; ++k) sigaction(kNumbers[k], &before_[k], nullptr);
  }

 private:
  static constexpr int kNumbers[2] = {SIGSEGV, SIGILL};
  struct sigaction before_[2];
};

}  // namespace

void set_order(Order chosen, unsigned seed) {
  order = chosen;
  generator.seed(seed + 1);
}

void set_fill(unsigned char byte) { fill_byte = byte; }

bool run(const Grid& grid) {
  const std::lock_guard<std::mutex> alone(one_launch);
  const Faults faults;
  machine.grid = grid;
  machine.failed = false;
  machine.first_stack = 0;
  gridDim = grid.blocks;
  blockDim = grid.threads;
  adopt(machine.host);
  machine.end_object = new_object();
  std::vector<unsigned> groups(size_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z /
                               unsigned(grid.together));
  std::iota(groups.begin(), groups.end(), 0u);
  if (order == Order::kReverse) std::reverse(groups.begin(), groups.end());
  if (order == Order::kRandom) std::shuffle(groups.begin(), groups.end(), generator);
  const auto run_group = [&](unsigned group) {
    return run_together(group * unsigned(grid.together));
  };
  const bool done = std::all_of(groups.begin(), groups.end(), run_group);
  acquire(machine.end_object);
  for (Block& block : machine.spent) unmap_memory(block.mapping, block.mapped);
  machine.spent.clear();
  forget_objects();
  return done;
}

}  // namespace emulation
