// Sizes of calls, the layouts that kernels take without further checks, and new results.
#pragma once

#include "call.h"

namespace reft::host {

constexpr int64_t kMaxRank = 256;

struct Sizes {
  int64_t num_rows, d, entries, rank;  // entries: of rows, or all rows
};

Sizes sizes_of(const Tensor& hidden, const Tensor& rows, const Tensor& write);

// Whether the kernels can take the arguments as they are: one set of weights, contiguous tensors of
// the right sizes on one device, and nothing read that is written. Says nothing of the values of
// rows. Arguments may be valid where this is false: Python or the operators then check them.
bool has_valid_layout(const Edit& edit);
bool has_valid_layout(const Backward& backward);

// Memory that keeps inputs, u and z of a forward pass, and the gradients of weights without coeff.
int64_t saved_bytes(const Edit& edit, const Sizes& sizes);
int64_t gradient_bytes(const Backward& backward, const Sizes& sizes);

// New tensors for the results of a call, on the current device; in place, hidden itself.
Edited new_results(const Edit& edit, const Sizes& sizes);
Gradients new_gradients(const Backward& backward, const Sizes& sizes);

}  // namespace reft::host
