// Argument structs of the operators in registration.cpp, read from the dispatcher's stack, and the
// function that writes results to the stack.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>

namespace reft {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Reads the arguments of a boxed call in schema order.
class Reader {
 public:
  explicit Reader(StableIValue* stack) : next_(stack) {}
  Tensor tensor() { return take<Tensor>(); }
  Optional optional() { return take<Optional>(); }
  bool flag() { return take<bool>(); }
  std::string text() { return take<std::string>(); }

 private:
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  StableIValue* next_;
};

// Writes the results of a call to the start of the dispatcher's stack.
template <class... Results>
void return_values(StableIValue* stack, const Results&... results) {
  ((*stack++ = torch::stable::detail::from(results)), ...);
}

// Arguments of edit and edit_. Members are declared in schema order because they are initialized
// (and so read from the stack) in that order.
struct EditCall {
  explicit EditCall(Reader in)
      : hidden(in.tensor()),
        rows(in.optional()),
        weight_ids(in.optional()),
        read(in.optional()),
        read_bias(in.optional()),
        write(in.tensor()),
        subtract_bias(in.optional()),
        coeff(in.optional()),
        subtract_projection(in.flag()),
        activation(in.text()),
        save(in.flag()) {}
  Tensor hidden;
  Optional rows, weight_ids, read, read_bias;
  Tensor write;
  Optional subtract_bias, coeff;
  bool subtract_projection;
  std::string activation;
  bool save;
};

// Arguments of edit_backward and edit_backward_. The in-place operator has no need_hidden.
struct EditBackwardCall {
  EditBackwardCall(Reader in, bool in_place)
      : grad(in.tensor()),
        saved_input(in.tensor()),
        u(in.tensor()),
        z(in.tensor()),
        rows(in.optional()),
        weight_ids(in.optional()),
        read(in.optional()),
        write(in.tensor()),
        coeff(in.optional()),
        subtract_projection(in.flag()),
        activation(in.text()),
        need_hidden(in_place || in.flag()),
        need_weights(in.flag()) {}
  Tensor grad, saved_input, u, z;
  Optional rows, weight_ids, read;
  Tensor write;
  Optional coeff;
  bool subtract_projection;
  std::string activation;
  bool need_hidden, need_weights;
};

// Arguments of red and red_.
struct RedCall {
  explicit RedCall(Reader in)
      : hidden(in.tensor()),
        rows(in.optional()),
        weight_ids(in.optional()),
        scale(in.tensor()),
        bias(in.tensor()),
        save(in.flag()) {}
  Tensor hidden;
  Optional rows, weight_ids;
  Tensor scale, bias;
  bool save;
};

// Arguments of red_backward and red_backward_. The in-place operator has no need_hidden.
struct RedBackwardCall {
  RedBackwardCall(Reader in, bool in_place)
      : grad(in.tensor()),
        saved_input(in.tensor()),
        rows(in.optional()),
        weight_ids(in.optional()),
        scale(in.tensor()),
        need_hidden(in_place || in.flag()),
        need_weights(in.flag()) {}
  Tensor grad, saved_input;
  Optional rows, weight_ids;
  Tensor scale;
  bool need_hidden, need_weights;
};

// Arguments of householder and cayley.
struct BuildCall {
  explicit BuildCall(Reader in)
      : X(in.tensor()),
        signs(in.optional()),
        base(in.optional()),
        base_point(in.optional()),
        W(in.optional()) {}
  Tensor X;
  Optional signs, base, base_point, W;
};

// Arguments of householder_backward and cayley_backward.
struct BuildBackwardCall {
  explicit BuildBackwardCall(Reader in)
      : grad_R(in.optional()),
        grad_D(in.optional()),
        X(in.tensor()),
        signs(in.optional()),
        base(in.optional()),
        aux(in.tensor()) {}
  Optional grad_R, grad_D;
  Tensor X;
  Optional signs, base;
  Tensor aux;
};

}  // namespace reft
