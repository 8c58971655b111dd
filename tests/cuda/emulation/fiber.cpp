#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#ifdef REFT_EMULATION_ASAN
#  include <sanitizer/asan_interface.h>
#  include <sanitizer/common_interface_defs.h>
#endif
#ifdef REFT_EMULATION_TSAN
#  include <sanitizer/tsan_interface.h>
extern "C" void __tsan_write_range(void* memory, unsigned long bytes);
#endif

namespace emulation {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kColours = 128,
                 kColourBytes =
                     320;  // stacks at equal offsets would share a few cache sets

struct Stack {
  char* memory;
  void* sanitizer;  // ThreadSanitizer's fiber
};
std::vector<Stack> stacks;

Stack& stack(size_t number) {
  while (stacks.size() <= number) {
    Stack made = {static_cast<char*>(map_memory(kStack)), nullptr};
    mprotect(made.memory, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
#ifdef REFT_EMULATION_TSAN
    made.sanitizer = __tsan_create_fiber(0);
#endif
    stacks.push_back(made);
  }
  return stacks[number];
}

}  // namespace

#if defined(__x86_64__)
extern "C" void reft_emulation_switch(void** from, void* to);
asm(R"(
.text
.hidden reft_emulation_switch
.globl reft_emulation_switch
.type reft_emulation_switch, @function
reft_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size reft_emulation_switch, .-reft_emulation_switch
)");
#endif

void start(Fiber& fiber, size_t number, void (*entry)()) {
  char* memory = stack(number).memory;
  fiber.sanitizer = stack(number).sanitizer;
  fiber.bottom = memory;
  fiber.size = kStack - number % kColours * kColourBytes / 64 * 64;
  fiber.fake_stack = nullptr;
  unpoison(memory, kStack);
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t*>(memory + fiber.size);
  *--top = 0;  // return address of entry; the ABI requires a stack 8 bytes off a multiple of
               // 16 at its first instruction
  *--top = reinterpret_cast<uintptr_t>(entry);
  fiber.stack_pointer = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = memory;
  fiber.context.uc_stack.ss_size = fiber.size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void adopt(Fiber& fiber) {
  fiber = Fiber();
#ifdef REFT_EMULATION_TSAN
  fiber.sanitizer = __tsan_get_current_fiber();
#endif
}

#ifdef REFT_EMULATION_ASAN
static Fiber* left;  // the fiber that switched last
#endif

void arrived([[maybe_unused]] Fiber& fiber) {
#ifdef REFT_EMULATION_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &bottom, &size);
  left->bottom = const_cast<void*>(bottom);
  left->size = size;
#endif
}

void switch_to(Fiber& from, Fiber& to, [[maybe_unused]] bool from_ends) {
#ifdef REFT_EMULATION_ASAN
  left = &from;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#ifdef REFT_EMULATION_TSAN
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  reft_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived(from);
}

#ifdef REFT_EMULATION_TSAN
namespace {
constexpr size_t kObjects = size_t(1) << 20;
char objects[kObjects * 8];
size_t used_objects = 0;
}  // namespace

size_t new_object() {
  if (used_objects == kObjects) {
    fprintf(stderr, "emulation: more than %zu barriers in one launch\n", kObjects);
    abort();
  }
  return used_objects++;
}
void forget_objects() { used_objects = 0; }
void release(size_t object) { __tsan_release(objects + object * 8); }
void acquire(size_t object) { __tsan_acquire(objects + object * 8); }
void freed(void* memory, size_t bytes) { __tsan_write_range(memory, bytes); }
#else
size_t new_object() { return 0; }
void forget_objects() {}
void release(size_t) {}
void acquire(size_t) {}
void freed(void*, size_t) {}
#endif

void* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    perror("emulation: mmap");
    abort();
  }
  return memory;
}

void unmap_memory(void* memory, size_t bytes) { munmap(memory, bytes); }

#ifdef REFT_EMULATION_ASAN
void poison(void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
void unpoison(void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
#else
void poison(void*, size_t) {}
void unpoison(void*, size_t) {}
#endif

}  // namespace emulation
