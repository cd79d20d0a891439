// The ops of an optimizer step on lists of fp32 tensors.

#include <cmath>

#include "bindings.h"

namespace fastllm {
namespace {

using Tensors = std::vector<Tensor>;

int64_t blocks_of(int64_t count) { return (count + kOptimizerBlock - 1) / kOptimizerBlock; }

// Runs a kernel on all blocks of a list of tensors, of which `arguments` has one entry each. Which
// thread takes a block is open: no block's result depends on it.
template <class A>
void for_all_blocks(Kernel<A> kernel, const std::vector<A>& arguments, int64_t bytes_per_element) {
  std::vector<int64_t> firsts;  // of each tensor, among the blocks of all
  int64_t total = 0;
  for (const A& one : arguments) {
    firsts.push_back(total);
    total += blocks_of(one.count);
  }
  if (total == 0) return;
  const int64_t grain =
      std::max<int64_t>(1, kBytesPerThread / (kOptimizerBlock * bytes_per_element));
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(firsts.begin(), firsts.end(), begin) - firsts.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t last = std::min(end, firsts[i] + blocks_of(arguments[i].count));
      if (begin < last) kernel(arguments[i], begin - firsts[i], last - firsts[i]);
      begin = std::max(begin, last);
    }
  });
}

// The Euclidean norm of all elements of a list, in fp64.
Tensor gradient_norm(Tensors gradients) {
  const Check check("gradient_norm");
  check.require(!gradients.empty(), "expected at least one gradient, found none");
  std::vector<SquareSum> arguments;
  std::vector<double> sums;
  int64_t blocks = 0;
  for (const Tensor& gradient : gradients) blocks += blocks_of(gradient.numel());
  sums.resize(blocks);
  double* next = sums.data();
  for (const Tensor& gradient : gradients) {
    check.require(gradient.scalar_type() == ScalarType::Float && gradient.is_contiguous(),
                  "gradients must be contiguous and float32");
    arguments.push_back({data<float>(gradient), gradient.numel(), next});
    next += blocks_of(gradient.numel());
  }
  for_all_blocks(kernels().optimizer.square_sum, arguments, 4);
  double total = 0;
  for (double sum : sums) total += sum;
  Tensor norm = empty(gradients[0], ScalarType::Double, {});
  *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(total);
  return norm;
}

void check_list(const Check& check, const char* name, const Tensors& list,
                const Tensors& parameters) {
  check.require(list.size() == parameters.size(),
                std::string(name) + " must have " + std::to_string(parameters.size()) +
                    " tensors, found " + std::to_string(list.size()));
  for (size_t i = 0; i < list.size(); ++i) {
    const bool fits = list[i].scalar_type() == ScalarType::Float && list[i].is_contiguous() &&
                      list[i].is_cpu() && list[i].numel() == parameters[i].numel();
    check.require(fits, std::string(name) + " " + std::to_string(i) +
                            " must be contiguous float32 with " +
                            std::to_string(parameters[i].numel()) + " elements on the CPU, found " +
                            dtype_name(list[i].scalar_type()) + " " + shape_name(list[i].sizes()));
  }
}

// One step of AdamW. The steps are counted here, as fp32 scalars: torch.optim keeps them so.
void adamw_(Tensors parameters, Tensors gradients, Tensors means, Tensors squares, Tensors steps,
            double gradient_scale, double learning_rate, double beta1, double beta2, double eps,
            double weight_decay) {
  const Check check("adamw_");
  check_list(check, "parameter", parameters, parameters);
  check_list(check, "gradient", gradients, parameters);
  check_list(check, "mean", means, parameters);
  check_list(check, "square", squares, parameters);
  check.require(steps.size() == parameters.size(), "there must be a step for each parameter");
  for (const Tensor& step : steps) check.tensor("step", step, ScalarType::Float, {});
  std::vector<AdamW> arguments;
  for (size_t i = 0; i < parameters.size(); ++i) {
    float* step = static_cast<float*>(steps[i].mutable_data_ptr());
    *step += 1;
    arguments.push_back({
        static_cast<float*>(parameters[i].mutable_data_ptr()),
        data<float>(gradients[i]),
        static_cast<float*>(means[i].mutable_data_ptr()),
        static_cast<float*>(squares[i].mutable_data_ptr()),
        parameters[i].numel(),
        static_cast<float>(gradient_scale),
        static_cast<float>(1 - beta1),
        static_cast<float>(beta2),
        static_cast<float>(1 - beta2),
        static_cast<float>(learning_rate * weight_decay),
        static_cast<float>(learning_rate / (1 - std::pow(beta1, *step))),
        static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, *step))),
        static_cast<float>(eps),
    });
  }
  for_all_blocks(kernels().optimizer.adamw, arguments, 28);
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("gradient_norm(Tensor[] gradients) -> Tensor");
  m.def("adamw_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means,"
        " Tensor(c!)[] squares, Tensor(d!)[] steps, float gradient_scale, float learning_rate,"
        " float beta1, float beta2, float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("gradient_norm", TORCH_BOX(&fastllm::gradient_norm));
  m.impl("adamw_", TORCH_BOX(&fastllm::adamw_));
}
