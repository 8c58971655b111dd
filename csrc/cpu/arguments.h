// The arguments of the operators of registration.cpp, one struct for each family of calls, and how
// they are read off the dispatcher's stack and how results are put there.
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

// Arguments of a boxed call, read in the order of the schema.
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

// Puts the results of a call where the dispatcher looks for them.
template <class... Results>
void give(StableIValue* stack, const Results&... results) {
  ((*stack++ = torch::stable::detail::from(results)), ...);
}

// edit and edit_; members stand in the schema's order, which is the order in which they are read.
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

// edit_backward and edit_backward_, which writes to grad and has no need_hidden.
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

// red and red_.
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

// red_backward and red_backward_.
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

// householder and cayley.
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

// householder_backward and cayley_backward.
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
