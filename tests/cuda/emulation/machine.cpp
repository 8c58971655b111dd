#include "machine.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
namespace reft_cuda {
unsigned char (*dynamic_arena)[];
}

namespace emulation {
namespace {

constexpr unsigned kWarpLanes = 32;
constexpr size_t kAlignment = 16;       // alignment of dynamic shared memory
constexpr unsigned char kGuard = 0xa5;  // bytes before and after it
// Fiber identities of ended threads that are kept. More would slow ThreadSanitizer down.
constexpr size_t kIdentities = 2048;

// Consecutive resident threads that wait for each other.
struct Scope {
  unsigned first = 0, count = 0, arrived = 0;
  Site site = {};
  size_t object = 0;
};

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, group;
};

struct Thread {
  Fiber fiber;
  unsigned number = 0, block = 0;  // index in the block, index of the block among resident blocks
  uint3 index = {};
  Wait waits = Wait::kNothing;
  Site site = {};
  int lane_mask = 0;
  uint32_t value = 0, received = 0;
  void* operands = nullptr;
  std::list<Copy> copies;  // a list moves no memory, which ThreadSanitizer would see
  unsigned groups = 0;  // committed groups of copies
};

struct Sent {
  void* to;
  float value[4];
};

// The state of a block's transfer barrier.
struct Transfers {
  uint64_t* barrier;
  unsigned phases = 0;
  int64_t missing = 0;  // bytes expected and not arrived
  bool expected = false;
  std::list<Sent> sent;
  std::list<Thread*> waiting;
  size_t object = 0;
};

struct Block {
  uint3 index = {};
  std::list<Transfers> transfers;
  unsigned ended = 0;
  Scope scope;
  unsigned char *mapping = nullptr, *shared = nullptr;
  size_t mapped = 0;
};

struct Machine {
  Grid grid = {};
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::vector<Scope> warps;
  Scope group;
  std::vector<Thread*> ready;
  Thread* current = nullptr;
  Fiber host;
  bool failed = false;
  unsigned ended = 0;
  size_t start_object = 0, end_object = 0, first_stack = 0;
  std::vector<Block> spent;  // blocks whose memory is not used again in this launch
};

Machine machine;
std::mutex one_launch;
Order order = Order::kForward;
std::minstd_rand generator;
unsigned char fill_byte = 0xff;

size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }
// Size of the inaccessible memory on either side of a block's shared memory. A larger size slows
// ThreadSanitizer down.
size_t fence() { return kRaces ? page() : 64 * page(); }
size_t round_up(size_t a, size_t b) { return (a + b - 1) / b * b; }
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

// `together`: all threads must wait at the same source location. `orders`: memory accesses are
// ordered.
template <class Last>
void wait_at(Scope& scope, Wait kind, Site site, bool together, bool orders, Last last) {
  Thread& thread = *machine.current;
  if (scope.arrived == 0) {
    scope.site = site;
    if (orders) scope.object = new_object();
  } else if (together &&
             (scope.site.line != site.line || strcmp(scope.site.file, site.file) != 0)) {
    report("divergent %s: %s is at %s:%d, another at %s:%d", name(kind), who(thread).c_str(),
           site.file, site.line, scope.site.file, scope.site.line);
    fail();
  }
  const size_t object = scope.object;
  thread.waits = kind;
  thread.site = site;
  if (orders) release(object);
  if (++scope.arrived == scope.count) {
    scope.arrived = 0;
    last();
    wake(scope);
  }
  next(false);
  if (orders) acquire(object);
}

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
    block.transfers.clear();
    block.scope = {b * count, count, 0, {}, 0};
    allot(block);
    for (unsigned w = 0; w < warps; ++w)
      machine.warps[b * warps + w] = {
          b * count + w * kWarpLanes, std::min(kWarpLanes, count - w * kWarpLanes), 0, {}, 0};
    for (unsigned t = 0; t < count; ++t) {
      Thread& thread = machine.threads[b * count + t];
      thread.number = t;
      thread.copies.clear();
      thread.groups = 0;
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

void barrier(Wait kind, Site site) {
  Thread& thread = *machine.current;
  if (kind == Wait::kGrid && !machine.grid.cooperative) {
    report("%s is at %s:%d, %s of a launch that is not cooperative", who(thread).c_str(), site.file,
           site.line, name(kind));
    fail();
  }
  if (kind == Wait::kCluster && kArch < 900) {
    report("%s is at %s:%d, %s on a chip that has no clusters", who(thread).c_str(), site.file,
           site.line, name(kind));
    fail();
  }
  const bool block = kind == Wait::kBlock || (kind == Wait::kCluster && !machine.grid.cluster);
  wait_at(block ? machine.blocks[thread.block].scope : machine.group, kind, site,
          kind == Wait::kBlock, true, [] {});
}

static Scope& warp_of(unsigned mask, Site site) {
  const Thread& thread = *machine.current;
  const unsigned warps = (threads_of_block() + kWarpLanes - 1) / kWarpLanes;
  Scope& warp = machine.warps[thread.block * warps + thread.number / kWarpLanes];
  if (mask != 0xffffffffu || warp.count != kWarpLanes) {
    report("%s is at %s:%d with mask %08x in a warp of %u lanes, full ones are emulated",
           who(thread).c_str(), site.file, site.line, mask, warp.count);
    fail();
  }
  return warp;
}

void sync_warp(unsigned mask, Site site) {
  wait_at(warp_of(mask, site), Wait::kWarp, site, true, true, [] {});
}

uint32_t shuffle_xor(unsigned mask, uint32_t bits, int lane_mask, Site site) {
  Thread& thread = *machine.current;
  Scope& warp = warp_of(mask, site);
  thread.value = bits;
  thread.lane_mask = lane_mask;
  // a shuffle exchanges values and does not order memory accesses
  wait_at(warp, Wait::kWarp, site, true, false, [&] {
    Thread* lanes = &machine.threads[warp.first];
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      if (lanes[lane].lane_mask != lane_mask || unsigned(lane_mask) >= kWarpLanes) {
        report("lanes of one shuffle at %s:%d give masks %d and %d", site.file, site.line,
               lanes[lane].lane_mask, lane_mask);
        fail();
      }
      lanes[lane].received = lanes[lane ^ unsigned(lane_mask)].value;
    }
  });
  return thread.received;
}

uint32_t shuffle(unsigned mask, uint32_t bits, int lane, Site site) {
  Thread& thread = *machine.current;
  Scope& warp = warp_of(mask, site);
  thread.value = bits;
  thread.lane_mask = int(unsigned(lane) % kWarpLanes);
  wait_at(warp, Wait::kWarp, site, true, false, [&] {
    Thread* lanes = &machine.threads[warp.first];
    for (unsigned k = 0; k < kWarpLanes; ++k) lanes[k].received = lanes[lanes[k].lane_mask].value;
  });
  return thread.received;
}

void copy_async(void* to, const void* from, unsigned bytes) {
  Thread& thread = *machine.current;
  if ((uintptr_t(to) | uintptr_t(from)) % bytes != 0) {
    report("%s starts a misaligned copy", who(thread).c_str());
    fail();
  }
  const bool now = order == Order::kReverse || (order == Order::kRandom && generator() % 2 == 0);
  if (now)
    memcpy(to, from, bytes);
  else
    thread.copies.push_back({to, from, bytes, thread.groups});
}

void commit_copies() { ++machine.current->groups; }

void wait_copies(unsigned groups) {
  Thread& thread = *machine.current;
  const auto waited = [&](const Copy& copy) { return copy.group + groups < thread.groups; };
  for (const Copy& copy : thread.copies)
    if (waited(copy)) memcpy(copy.to, copy.from, copy.bytes);
  thread.copies.remove_if(waited);
}

static Transfers& transfers_of(uint64_t* barrier, Block& block) {
  for (Transfers& each : block.transfers)
    if (each.barrier == barrier) return each;
  report("%s uses a transfer barrier that has not been started", who(*machine.current).c_str());
  fail();
}

static void end_phase(Transfers& transfers) {
  if (!transfers.expected || transfers.missing != 0) return;
  for (const Sent& sent : transfers.sent) memcpy(sent.to, sent.value, sizeof sent.value);
  transfers.sent.clear();
  transfers.expected = false;
  ++transfers.phases;
  for (Thread* thread : transfers.waiting) {
    thread->waits = Wait::kNothing;
    machine.ready.push_back(thread);
  }
  transfers.waiting.clear();
}

void start_transfers(uint64_t* arrived) {
  Block& block = machine.blocks[machine.current->block];
  block.transfers.push_back({});
  block.transfers.back().barrier = arrived;
  block.transfers.back().object = new_object();
}

void expect_transfers(uint64_t* arrived, unsigned bytes) {
  Transfers& transfers = transfers_of(arrived, machine.blocks[machine.current->block]);
  if (transfers.expected) {
    report("%s expects transfers twice in a phase", who(*machine.current).c_str());
    fail();
  }
  transfers.expected = true;
  transfers.missing += bytes;
  release(transfers.object);
  end_phase(transfers);
}

void transfer(float* place, const float (&value)[4], uint64_t* arrived, unsigned to, Site site) {
  void* remote = remote_shared(place, to, site);
  auto* barrier = static_cast<uint64_t*>(remote_shared(arrived, to, site));
  Transfers& transfers = transfers_of(barrier, machine.blocks[to]);
  release(transfers.object);
  if (order == Order::kReverse) {
    memcpy(remote, value, sizeof value);
  } else {
    transfers.sent.push_back({remote, {}});
    memcpy(transfers.sent.back().value, value, sizeof value);
  }
  transfers.missing -= int64_t(sizeof value);
  end_phase(transfers);
}

void wait_transfers(uint64_t* arrived, unsigned parity, Site site) {
  Thread& thread = *machine.current;
  Transfers& transfers = transfers_of(arrived, machine.blocks[thread.block]);
  const size_t object = transfers.object;
  if (transfers.phases % 2 == parity) {
    thread.waits = Wait::kTransfer;
    thread.site = site;
    transfers.waiting.push_back(&thread);
    next(false);
  }
  acquire(object);
}

void with_lanes(void* operands, void (*last)(void* const* lanes), Site site) {
  machine.current->operands = operands;
  Scope& warp = warp_of(0xffffffffu, site);
  wait_at(warp, Wait::kWarp, site, true, false, [&] {
    void* lanes[kWarpLanes];
    for (unsigned k = 0; k < kWarpLanes; ++k) lanes[k] = machine.threads[warp.first + k].operands;
    last(lanes);
  });
}

void* remote_shared(void* own, unsigned rank, Site site) {
  const Thread& thread = *machine.current;
  const Block& block = machine.blocks[thread.block];
  const auto address = static_cast<unsigned char*>(own);
  if (kArch < 900 || !machine.grid.cluster || rank >= unsigned(machine.grid.together) ||
      address < block.shared || address >= block.shared + machine.grid.shared) {
    report(
        "%s maps %p to rank %u at %s:%d: not in its shared memory, or no such block in its cluster",
        who(thread).c_str(), own, rank, site.file, site.line);
    fail();
  }
  return machine.blocks[rank].shared + (address - block.shared);
}

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
