// What emulated threads wait for: barriers, the lanes of a warp, copies and transfers.
#include <string.h>

#include "state.h"

namespace emulation {
namespace {

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

Scope& warp_of(unsigned mask, Site site) {
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

Transfers& transfers_of(uint64_t* barrier, unsigned block) {
  for (Transfers& each : machine.transfers[block % kMaxCluster])
    if (each.barrier == barrier) return each;
  report("%s uses a transfer barrier that has not been started", who(*machine.current).c_str());
  fail();
}

void end_phase(Transfers& transfers) {
  if (!transfers.expected || transfers.missing != 0) return;
  for (unsigned k = 0; k < transfers.waiting; ++k)
    memcpy(transfers.sent[k].to, transfers.sent[k].value, transfers.sent[k].bytes);
  release(transfers.object);
  transfers.waiting = 0;
  transfers.expected = false;
  ++transfers.phases;
  for (Thread& thread : machine.threads)
    if (thread.waits == Wait::kTransfer && thread.operands == &transfers) {
      thread.waits = Wait::kNothing;
      machine.ready.push_back(&thread);
    }
}

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
  if (now) {
    memcpy(to, from, bytes);
  } else if (thread.started == kMaxCopies) {
    report("%s has more than %u incomplete copies", who(thread).c_str(), kMaxCopies);
    fail();
  } else {
    thread.copies[thread.started++] = {to, from, bytes, thread.groups};
  }
}

void commit_copies() { ++machine.current->groups; }

void wait_copies(unsigned groups) {
  Thread& thread = *machine.current;
  unsigned kept = 0;
  for (unsigned k = 0; k < thread.started; ++k) {
    const Copy copy = thread.copies[k];
    if (copy.group + groups < thread.groups)
      memcpy(copy.to, copy.from, copy.bytes);
    else
      thread.copies[kept++] = copy;
  }
  thread.started = kept;
}

void start_transfers(uint64_t* arrived) {
  for (Transfers& each : machine.transfers[machine.current->block % kMaxCluster]) {
    if (each.barrier != nullptr) continue;
    each.barrier = arrived;
    each.phases = each.waiting = 0;
    each.missing = 0;
    each.expected = false;
    each.object = new_object();
    return;
  }
  report("%s starts more than %u transfer barriers", who(*machine.current).c_str(), kMaxBarriers);
  fail();
}

void expect_transfers(uint64_t* arrived, unsigned bytes) {
  Transfers& transfers = transfers_of(arrived, machine.current->block);
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
  Transfers& transfers = transfers_of(barrier, to);
  if (order == Order::kReverse) {
    memcpy(remote, value, sizeof value);
  } else if (transfers.waiting == kMaxSent) {
    report("%s sends too much in a phase", who(*machine.current).c_str());
    fail();
  } else {
    transfers.sent[transfers.waiting++] = {
        remote, {value[0], value[1], value[2], value[3]}, sizeof value};
  }
  release(transfers.object);
  transfers.missing -= int64_t(sizeof value);
  end_phase(transfers);
}

void wait_transfers(uint64_t* arrived, unsigned parity, Site site) {
  Thread& thread = *machine.current;
  Transfers& transfers = transfers_of(arrived, thread.block);
  const size_t object = transfers.object;
  if (transfers.phases % 2 == parity) {
    thread.waits = Wait::kTransfer;
    thread.site = site;
    thread.operands = &transfers;
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

}  // namespace emulation
