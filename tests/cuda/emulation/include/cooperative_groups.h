// Emulation of the parts of CUDA's cooperative groups that csrc/cuda uses.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    emulation::barrier(emulation::Wait::kCluster, {file, line});
  }

  template <class T>
  T* map_shared_rank(T* own, unsigned rank, const char* file = __builtin_FILE(),
                     int line = __builtin_LINE()) const {
    return static_cast<T*>(emulation::remote_shared(own, rank, {file, line}));
  }
};

struct grid_group {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    emulation::barrier(emulation::Wait::kGrid, {file, line});
  }
};

inline cluster_group this_cluster() { return {}; }
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
