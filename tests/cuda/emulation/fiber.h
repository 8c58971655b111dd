// Fibers on pooled stacks, and what AddressSanitizer and ThreadSanitizer must be told about them.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__)
#  include <ucontext.h>
#endif

namespace emulation {

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* sanitizer = nullptr;   // ThreadSanitizer's own fiber
};

// Prepares `fiber` to run `entry` on stack `number` of the pool when it is first switched to;
// `entry` never returns. To ThreadSanitizer all fibers of a number are one thread.
void start(Fiber& fiber, size_t number, void (*entry)());
void adopt(Fiber& fiber);  // the caller's own stack
void switch_to(Fiber& from, Fiber& to, bool from_ends = false);
void arrived(Fiber& fiber);  // the first thing that a new fiber calls

// Happens-before edges; they do nothing without ThreadSanitizer. An object is a number that is not
// used again.
constexpr bool kRaces =
#ifdef REFT_EMULATION_TSAN
    true;
#else
    false;
#endif
void release(size_t object);
void acquire(size_t object);
size_t new_object();
void forget_objects();  // all of them are in the past

void* map_memory(size_t bytes);  // whole pages, zero
void unmap_memory(void* memory, size_t bytes);
void poison(void* memory, size_t bytes);
void unpoison(void* memory, size_t bytes);
void freed(void* memory, size_t bytes);  // counts as a write of the running fiber

}  // namespace emulation
