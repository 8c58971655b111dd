// The state of the emulated machine, which machine.cpp runs and waits.cpp synchronizes.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "machine.h"

namespace emulation {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kMaxCopies = 64, kMaxSent = 512, kMaxBarriers = 2;


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
  Copy copies[kMaxCopies];
  unsigned started = 0, groups = 0;  // copies that have not taken place, committed groups
};

struct Sent {
  void* to;
  float value[4];
  size_t bytes;
};

// The state of a block's transfer barrier. Like that of the copies, its books are plain arrays:
// ThreadSanitizer would see the functions that move and free memory.
struct Transfers {
  uint64_t* barrier = nullptr;
  unsigned phases = 0;
  int64_t missing = 0;  // bytes expected and not arrived
  bool expected = false;
  Sent sent[kMaxSent];
  unsigned waiting = 0;  // values in `sent`
  size_t object = 0;
};

struct Block {
  uint3 index = {};
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
  Transfers transfers[kMaxCluster][kMaxBarriers];
  std::vector<Thread*> ready;
  Thread* current = nullptr;
  Fiber host;
  bool failed = false;
  unsigned ended = 0;
  size_t start_object = 0, end_object = 0, first_stack = 0;
  std::vector<Block> spent;  // blocks whose memory is not used again in this launch
};

extern Machine machine;
extern Order order;
extern std::minstd_rand generator;

unsigned threads_of_block();
const char* name(Wait kind);
std::string who(const Thread& thread);
void next(bool ends);  // called when the running thread waits or has ended
[[noreturn]] void fail();
void wake(Scope& scope);

}  // namespace emulation
