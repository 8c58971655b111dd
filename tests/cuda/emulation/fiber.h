// Fibers on pooled stacks, annotated for AddressSanitizer and ThreadSanitizer.
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
  void* fake_stack = nullptr;  // used by AddressSanitizer
  void* sanitizer = nullptr;   // used by ThreadSanitizer
};

// Prepares `fiber` to run `entry` on stack `number` of the pool when it is first switched to.
// `entry` must not return. ThreadSanitizer treats all fibers with the same number as one thread.
void start(Fiber& fiber, size_t number, void (*entry)());
void adopt(Fiber& fiber);  // uses the stack of the caller
void switch_to(Fiber& from, Fiber& to, bool from_ends = false);
void arrived(Fiber& fiber);  // must be called first by a new fiber

// Happens-before edges, without effect unless ThreadSanitizer is used. Object numbers are not
// reused.
constexpr bool kRaces =
#ifdef REFT_EMULATION_TSAN
    true;
#else
    false;
#endif
void release(size_t object);
void acquire(size_t object);
size_t new_object();
void forget_objects();  // objects so far are not used again

void* map_memory(size_t bytes);  // zero-filled pages
void unmap_memory(void* memory, size_t bytes);
void poison(void* memory, size_t bytes);
void unpoison(void* memory, size_t bytes);
void freed(void* memory, size_t bytes);  // recorded as a write of the running fiber

}  // namespace emulation
