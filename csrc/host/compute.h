// Edits and their backward passes on tensors without a graph: on the CPU through the operators of
// the native library, on a GPU through plans, otherwise through Python.
#pragma once

#include "call.h"
#include "python.h"

namespace reft::host {

// Whether the arguments of an edit on the route triton certainly pass all checks. They may be valid
// where this is false: Python then checks them, and reports errors.
bool is_valid_on_gpu(const Edit& edit, PyObject* rows);

// Runs an edit. Must be called below autograd, with the GIL held, on the route of edit.hidden.
Edited compute(const Edit& edit, Route route);

// Runs a backward pass. Must be called below autograd, unless the route is python.
Gradients compute(const Backward& backward, Route route);

}  // namespace reft::host
