// Arguments of one edit and of its backward pass, and the backends that compute them.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "tensors.h"

namespace reft::host {

constexpr const char* kActivations[] = {"linear", "relu", "gelu",   "gelu_tanh",
                                        "silu",   "tanh", "sigmoid"};

// Settings of an edit that are not tensors.
struct Settings {
  bool subtract_projection = false;
  uint8_t activation = 0;  // index into kActivations
};

// Arguments of an edit; absent tensors are undefined. hidden is [..., d] and contiguous.
struct Edit {
  Tensor hidden, rows, weight_ids, read, read_bias, write, subtract_bias, coeff;
  Tensor forward_read, forward_write;  // read and write of the forward pass, if it has others
  Settings settings;
  bool in_place = false, save = false;
};

// Results of an edit: out is [..., d]. The others are undefined where they are not needed.
struct Edited {
  Tensor out, saved_input, u, z;
};

// Arguments of the backward pass; u and z as the forward saved them, saved_input is [N, d].
struct Backward {
  Tensor grad, saved_input, u, z, rows, weight_ids, read, write, coeff;
  Settings settings;
  bool in_place = false, need_hidden = false, need_weights = false;
  int task = -1;  // the number of the backward pass in this process
};

// Gradients; undefined where they are not needed.
struct Gradients {
  Tensor hidden, read, read_bias, write, subtract_bias, coeff;
};

// Which code computes the edits of a device type and dtype.
enum class Route : int8_t {
  unknown = 0,
  cpu = 1,     // the operators of the native CPU library
  triton = 2,  // compiled Triton kernels, launched from this library
  python = 3,  // everything else
};

Route route_of(const Tensor& tensor);
void reset_routes();

}  // namespace reft::host
