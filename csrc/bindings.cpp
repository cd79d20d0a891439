// The ops that PyTorch sees, but for attention: argument checks, memory and threads around the
// kernels. The contract of each op is in its reference, fastllm/ops/<op>.py.

#include "bindings.h"

namespace fastllm {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// ---- rms_norm -------------------------------------------------------------------------------

Three rms_norm_forward(Tensor x, Tensor weight, double eps, std::optional<Tensor> residual) {
  const Check check("rms_norm_forward");
  const Format format = check.format("x", x);
  const ScalarType dtype = x.scalar_type();
  check.rank("x", x, 2);
  const int64_t rows = x.size(0), columns = x.size(1);
  check.tensor("x", x, dtype, {rows, columns});
  check.tensor("weight", weight, dtype, {columns});
  if (residual) check.tensor("residual", *residual, dtype, {rows, columns});

  Tensor y = like(x);
  Tensor h = residual ? like(x) : empty(x, dtype, {0});
  Tensor rstd = empty(x, ScalarType::Float, {rows});
  const RmsNormForward arguments = {
      data<void>(x),
      pointer(residual),
      data<void>(weight),
      y.mutable_data_ptr(),
      h.mutable_data_ptr(),
      static_cast<float*>(rstd.mutable_data_ptr()),
      columns,
      static_cast<float>(eps),
  };
  parallel(kernels().rms_norm.forward[format], arguments, rows, 3 * columns * x.element_size());
  return {y, h, rstd};
}

Two rms_norm_backward(Tensor dy, std::optional<Tensor> dh, Tensor h, Tensor weight, Tensor rstd,
                      bool weight_grad) {
  const Check check("rms_norm_backward");
  const Format format = check.format("h", h);
  const ScalarType dtype = h.scalar_type();
  check.rank("h", h, 2);
  const int64_t rows = h.size(0), columns = h.size(1);
  check.tensor("h", h, dtype, {rows, columns});
  check.tensor("dy", dy, dtype, {rows, columns});
  if (dh) check.tensor("dh", *dh, dtype, {rows, columns});
  check.tensor("weight", weight, dtype, {columns});
  check.tensor("rstd", rstd, ScalarType::Float, {rows});

  // Enough blocks for the threads, and few enough that adding them up is nothing.
  constexpr int64_t kFewestRows = 16, kMostBlocks = 64;
  const int64_t block = std::max(kFewestRows, (rows + kMostBlocks - 1) / kMostBlocks);
  const int64_t blocks = (rows + block - 1) / block;
  Tensor dx = like(h);
  Tensor partial = zeros(h, ScalarType::Float, {blocks, weight_grad ? columns : 0});
  const RmsNormBackward arguments = {
      data<void>(dy),
      pointer(dh),
      data<void>(h),
      data<void>(weight),
      data<float>(rstd),
      dx.mutable_data_ptr(),
      weight_grad ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr,
      rows,
      columns,
      block,
  };
  parallel(kernels().rms_norm.backward[format], arguments, blocks,
           4 * block * columns * h.element_size());
  const int64_t first_dimension = 0;
  return {dx, torch::stable::sum(partial, {{&first_dimension, 1}}, false)};
}

// ---- rope -----------------------------------------------------------------------------------

Two rope_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool inverse) {
  const Check check("rope_forward");
  const Format format = check.format("q", q);
  const ScalarType dtype = q.scalar_type();
  check.rank("q", q, 3);
  check.rank("k", k, 3);
  check.rank("cos", cos, 2);
  const int64_t tokens = q.size(0), heads = q.size(1), head_size = q.size(2);
  const int64_t key_heads = k.size(1), rows = cos.size(0);
  check.require(head_size % 2 == 0,
                "the head size must be even, found " + std::to_string(head_size));
  check.tensor("q", q, dtype, {tokens, heads, head_size});
  check.tensor("k", k, dtype, {tokens, key_heads, head_size});
  check.tensor("cos", cos, ScalarType::Float, {rows, head_size / 2});
  check.tensor("sin", sin, ScalarType::Float, {rows, head_size / 2});
  check.tensor("positions", positions, ScalarType::Int, {tokens});
  const int32_t* position = data<int32_t>(positions);
  for (int64_t t = 0; t < tokens; ++t) {
    if (position[t] >= 0 && position[t] < rows) continue;
    check.fail("positions must lie in 0.." + std::to_string(rows - 1) + ", found " +
               std::to_string(position[t]) + " at token " + std::to_string(t));
  }

  Tensor q_out = like(q), k_out = like(k);
  const RopeForward arguments = {
      data<void>(q),
      data<void>(k),
      data<float>(cos),
      data<float>(sin),
      position,
      q_out.mutable_data_ptr(),
      k_out.mutable_data_ptr(),
      heads,
      key_heads,
      head_size,
      inverse,
  };
  parallel(kernels().rope.forward[format], arguments, tokens,
           2 * (heads + key_heads) * head_size * q.element_size());
  return {q_out, k_out};
}

// ---- swiglu ---------------------------------------------------------------------------------

void check_like(const Check& check, const char* name, const Tensor& tensor, const Tensor& gate) {
  const auto shape = gate.sizes(), found = tensor.sizes();
  const bool fits = tensor.scalar_type() == gate.scalar_type() && tensor.dim() == gate.dim() &&
                    std::equal(shape.begin(), shape.end(), found.begin());
  check.require(fits, std::string(name) + " must be " + dtype_name(gate.scalar_type()) + " " +
                          shape_name(shape) + " like gate, found " +
                          dtype_name(tensor.scalar_type()) + " " + shape_name(found));
  check.require(tensor.is_contiguous(), std::string(name) + " must be contiguous");
  check.require(tensor.is_cpu(), std::string(name) + " must be on the CPU");
}

Tensor swiglu_forward(Tensor gate, Tensor up) {
  const Check check("swiglu_forward");
  const Format format = check.format("gate", gate);
  check_like(check, "gate", gate, gate);
  check_like(check, "up", up, gate);
  Tensor out = like(gate);
  const SwigluForward arguments = {data<void>(gate), data<void>(up), out.mutable_data_ptr()};
  parallel(kernels().swiglu.forward[format], arguments, gate.numel(), 3 * gate.element_size());
  return out;
}

Two swiglu_backward(Tensor dout, Tensor gate, Tensor up) {
  const Check check("swiglu_backward");
  const Format format = check.format("gate", gate);
  check_like(check, "gate", gate, gate);
  check_like(check, "up", up, gate);
  check_like(check, "dout", dout, gate);
  Tensor dgate = like(gate), dup = like(gate);
  const SwigluBackward arguments = {data<void>(dout), data<void>(gate), data<void>(up),
                                    dgate.mutable_data_ptr(), dup.mutable_data_ptr()};
  parallel(kernels().swiglu.backward[format], arguments, gate.numel(), 5 * gate.element_size());
  return {dgate, dup};
}

// ---- linear_logprob -------------------------------------------------------------------------

// Exponentials cost more than the traffic: a logit counts as this many bytes of work.
constexpr int64_t kBytesPerLogit = 16;

void check_targets(const Check& check, const Tensor& logits, const Tensor& targets) {
  check.rank("logits", logits, 2);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  check.tensor("logits", logits, logits.scalar_type(), {rows, vocabulary});
  check.tensor("targets", targets, ScalarType::Long, {rows});
  const int64_t* target = data<int64_t>(targets);
  for (int64_t row = 0; row < rows; ++row) {
    if (target[row] >= 0 && target[row] < vocabulary) continue;
    check.fail("targets must lie in 0.." + std::to_string(vocabulary - 1) + ", found " +
               std::to_string(target[row]) + " in row " + std::to_string(row));
  }
}

Three linear_logprob_forward(Tensor logits, Tensor targets, double temperature, double softcap) {
  const Check check("linear_logprob_forward");
  const Format format = check.format("logits", logits);
  check_targets(check, logits, targets);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  Tensor logp = empty(logits, ScalarType::Float, {rows});
  Tensor entropy = like(logp), lse = like(logp);
  const LinearLogprobForward arguments = {
      data<void>(logits),
      data<int64_t>(targets),
      static_cast<float*>(logp.mutable_data_ptr()),
      static_cast<float*>(entropy.mutable_data_ptr()),
      static_cast<float*>(lse.mutable_data_ptr()),
      vocabulary,
      static_cast<float>(temperature),
      static_cast<float>(softcap),
  };
  parallel(kernels().linear_logprob.forward[format], arguments, rows, vocabulary * kBytesPerLogit);
  return {logp, entropy, lse};
}

void linear_logprob_backward_(Tensor logits, Tensor targets, Tensor lse, Tensor entropy,
                              Tensor dlogp, Tensor dentropy, double temperature, double softcap) {
  const Check check("linear_logprob_backward_");
  const Format format = check.format("logits", logits);
  check_targets(check, logits, targets);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  check.tensor("lse", lse, ScalarType::Float, {rows});
  check.tensor("entropy", entropy, ScalarType::Float, {rows});
  check.tensor("dlogp", dlogp, ScalarType::Float, {rows});
  check.tensor("dentropy", dentropy, ScalarType::Float, {rows});
  const LinearLogprobBackward arguments = {
      logits.mutable_data_ptr(),
      data<int64_t>(targets),
      data<float>(lse),
      data<float>(entropy),
      data<float>(dlogp),
      data<float>(dentropy),
      vocabulary,
      static_cast<float>(temperature),
      static_cast<float>(softcap),
  };
  parallel(kernels().linear_logprob.backward[format], arguments, rows, vocabulary * kBytesPerLogit);
}

// ---- pairwise_loss --------------------------------------------------------------------------

Three pairwise_loss_forward(Tensor chosen, Tensor rejected, std::optional<Tensor> margin,
                            double centering) {
  const Check check("pairwise_loss_forward");
  const Format format = check.format("chosen", chosen);
  check.rank("chosen", chosen, 1);
  const int64_t pairs = chosen.size(0);
  check.tensor("chosen", chosen, chosen.scalar_type(), {pairs});
  check.tensor("rejected", rejected, chosen.scalar_type(), {pairs});
  if (margin) check.tensor("margin", *margin, chosen.scalar_type(), {pairs});
  Tensor loss = empty(chosen, ScalarType::Float, {});
  Tensor dchosen = empty(chosen, ScalarType::Float, {pairs}), drejected = like(dchosen);
  const PairwiseLossForward arguments = {
      data<void>(chosen),
      data<void>(rejected),
      pointer(margin),
      static_cast<float*>(loss.mutable_data_ptr()),
      static_cast<float*>(dchosen.mutable_data_ptr()),
      static_cast<float*>(drejected.mutable_data_ptr()),
      static_cast<float>(centering),
  };
  kernels().pairwise_loss.forward[format](arguments, 0, pairs);
  return {loss, dchosen, drejected};
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps, Tensor? residual)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd,"
        " bool weight_grad) -> (Tensor, Tensor)");
  m.def("rope_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool inverse)"
        " -> (Tensor, Tensor)");
  m.def("swiglu_forward(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("linear_logprob_forward(Tensor logits, Tensor targets, float temperature, float softcap)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("linear_logprob_backward_(Tensor(a!) logits, Tensor targets, Tensor lse, Tensor entropy,"
        " Tensor dlogp, Tensor dentropy, float temperature, float softcap) -> ()");
  m.def("pairwise_loss_forward(Tensor chosen, Tensor rejected, Tensor? margin, float centering)"
        " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&fastllm::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&fastllm::rms_norm_backward));
  m.impl("rope_forward", TORCH_BOX(&fastllm::rope_forward));
  m.impl("swiglu_forward", TORCH_BOX(&fastllm::swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&fastllm::swiglu_backward));
  m.impl("linear_logprob_forward", TORCH_BOX(&fastllm::linear_logprob_forward));
  m.impl("linear_logprob_backward_", TORCH_BOX(&fastllm::linear_logprob_backward_));
  m.impl("pairwise_loss_forward", TORCH_BOX(&fastllm::pairwise_loss_forward));
}
