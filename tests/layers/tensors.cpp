// The drop-in set "tensors": tensor.h, tensor.cpp, autograd.cpp. One step of gradient descent, as in tensor.h's manual.
#include <cstdio>

#include "tensor.h"

int main() {
  bert::Tensor x({4, 3}, 1.f), w({2, 3}, 0.5f), target({4, 2}, 1.f);
  w.set_needs_grad();
  bert::Tape tape;
  tape.backward(bert::mse_loss(bert::linear(x, w), target));
  for (int64_t i = 0; i < w.size(); i++) w.data()[i] -= 0.1f * w.grad()[i];
  std::printf("w = %g\n", (double)w.data()[0]);
  return w.data()[0] > 0.4499f && w.data()[0] < 0.4501f ? 0 : 1;   // by hand: y = 1.5, dw = 4 rows of 2 (1.5 - 1) / 8 = 0.5, w = 0.5 - 0.05
}
