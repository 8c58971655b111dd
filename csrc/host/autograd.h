// Edits with their autograd node.
#pragma once

#include <optional>

#include "call.h"
#include "python.h"

namespace reft::host {

// Measures the reference counts of a tensor that nothing shares; they depend on the release. Called
// when the library is loaded, with the GIL held.
void measure_reference_counts();

// Runs an edit and records it for autograd if an argument requires grad. Returns an undefined
// tensor, and has then done nothing, if the call needs PyTorch's dispatcher or the checks in Python.
// rows is the Python object of edit.rows.
Tensor apply_edit(Edit& edit, PyObject* rows);

}  // namespace reft::host
