// The ops that PyTorch sees, but for attention: argument checks, memory and threads around the
// kernels. The contract of each op is in its reference, fastllm/ops/<op>.py.

#include "bindings.h"

namespace fastllm {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// The rows of a new contiguous matrix.
OutRows fresh(Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.stride(0)}; }

constexpr Rows kNoRows = {nullptr, 0};
constexpr OutRows kNoOutRows = {nullptr, 0};

// ---- rms_norm -------------------------------------------------------------------------------

Three rms_norm_forward(Tensor x, Tensor weight, double eps, std::optional<Tensor> residual) {
  const Check check("rms_norm_forward");
  const Format format = check.format("x", x);
  const ScalarType dtype = x.scalar_type();
  check.rank("x", x, 2);
  const int64_t rows = x.size(0), columns = x.size(1);
  const Rows x_rows = check.rows("x", x, dtype, {rows, columns});
  check.tensor("weight", weight, dtype, {columns});

  Tensor y = empty(x, dtype, {rows, columns});
  Tensor h = empty(x, dtype, {residual ? rows : 0, residual ? columns : 0});
  Tensor rstd = empty(x, ScalarType::Float, {rows});
  const RmsNormForward arguments = {
      x_rows,
      residual ? check.rows("residual", *residual, dtype, {rows, columns}) : kNoRows,
      data<void>(weight),
      fresh(y),
      residual ? fresh(h) : kNoOutRows,
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
  check.tensor("weight", weight, dtype, {columns});
  check.tensor("rstd", rstd, ScalarType::Float, {rows});

  // Enough blocks for the threads, and few enough that adding them up is nothing.
  constexpr int64_t kFewestRows = 16, kMostBlocks = 64;
  const int64_t block = std::max(kFewestRows, (rows + kMostBlocks - 1) / kMostBlocks);
  const int64_t blocks = (rows + block - 1) / block;
  Tensor dx = empty(h, dtype, {rows, columns});
  Tensor partial = zeros(h, ScalarType::Float, {blocks, weight_grad ? columns : 0});
  const RmsNormBackward arguments = {
      check.rows("dy", dy, dtype, {rows, columns}),
      dh ? check.rows("dh", *dh, dtype, {rows, columns}) : kNoRows,
      check.rows("h", h, dtype, {rows, columns}),
      data<void>(weight),
      data<float>(rstd),
      fresh(dx),
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

// [T, H, D] in place: the channels of a head must lie side by side.
Heads heads_of(const Check& check, const char* name, const Tensor& in, Tensor& out) {
  for (const Tensor& tensor : {in, out}) {
    check.require(tensor.size(2) <= 1 || tensor.stride(2) == 1,
                  std::string(name) + " must have heads whose channels lie side by side, found " +
                      "a stride of " + std::to_string(tensor.stride(2)));
  }
  return {in.const_data_ptr(),     in.stride(0),  in.stride(1),  out.mutable_data_ptr(),
          out.stride(0),           out.stride(1), in.size(1)};
}

void rope_into_(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool inverse,
                Tensor q_out, Tensor k_out) {
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
  check.shape("q", q, dtype, {tokens, heads, head_size});
  check.shape("k", k, dtype, {tokens, key_heads, head_size});
  check.shape("q_out", q_out, dtype, {tokens, heads, head_size});
  check.shape("k_out", k_out, dtype, {tokens, key_heads, head_size});
  check.tensor("cos", cos, ScalarType::Float, {rows, head_size / 2});
  check.tensor("sin", sin, ScalarType::Float, {rows, head_size / 2});
  check.tensor("positions", positions, ScalarType::Int, {tokens});
  const int32_t* position = data<int32_t>(positions);
  for (int64_t t = 0; t < tokens; ++t) {
    if (position[t] >= 0 && position[t] < rows) continue;
    check.fail("positions must lie in 0.." + std::to_string(rows - 1) + ", found " +
               std::to_string(position[t]) + " at token " + std::to_string(t));
  }

  const RopeForward arguments = {
      heads_of(check, "q", q, q_out),
      heads_of(check, "k", k, k_out),
      data<float>(cos),
      data<float>(sin),
      position,
      head_size,
      inverse,
  };
  parallel(kernels().rope.forward[format], arguments, tokens,
           2 * (heads + key_heads) * head_size * q.element_size());
}

Two rope_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool inverse) {
  const Check check("rope_forward");
  check.rank("q", q, 3);
  check.rank("k", k, 3);
  Tensor q_out = empty(q, q.scalar_type(), {q.size(0), q.size(1), q.size(2)});
  Tensor k_out = empty(k, k.scalar_type(), {k.size(0), k.size(1), k.size(2)});
  rope_into_(q, k, cos, sin, positions, inverse, q_out, k_out);
  return {q_out, k_out};
}

// ---- swiglu ---------------------------------------------------------------------------------

// A matrix without gaps is one long row: its pieces are whole vectors but for the last.
int64_t columns_as_rows(const Tensor& matrix, std::initializer_list<Rows> inputs,
                        std::initializer_list<OutRows> outputs) {
  const int64_t columns = matrix.size(1);
  const auto gapless = [&](const auto& rows) { return rows.stride == columns; };
  const bool all = std::all_of(inputs.begin(), inputs.end(), gapless) &&
                   std::all_of(outputs.begin(), outputs.end(), gapless);
  return all ? matrix.numel() : columns;
}

Tensor swiglu_forward(Tensor gate, Tensor up) {
  const Check check("swiglu_forward");
  const Format format = check.format("gate", gate);
  check.rank("gate", gate, 2);
  const ScalarType dtype = gate.scalar_type();
  const int64_t rows = gate.size(0), columns = gate.size(1);
  Tensor out = empty(gate, dtype, {rows, columns});
  SwigluForward arguments = {
      check.rows("gate", gate, dtype, {rows, columns}),
      check.rows("up", up, dtype, {rows, columns}),
      fresh(out),
      columns,
  };
  arguments.columns = columns_as_rows(gate, {arguments.gate, arguments.up}, {arguments.out});
  parallel(kernels().swiglu.forward[format], arguments, gate.numel(), 3 * gate.element_size());
  return out;
}

void swiglu_backward_into_(Tensor dout, Tensor gate, Tensor up, Tensor dgate, Tensor dup) {
  const Check check("swiglu_backward");
  const Format format = check.format("gate", gate);
  check.rank("gate", gate, 2);
  const ScalarType dtype = gate.scalar_type();
  const int64_t rows = gate.size(0), columns = gate.size(1);
  SwigluBackward arguments = {
      check.rows("dout", dout, dtype, {rows, columns}),
      check.rows("gate", gate, dtype, {rows, columns}),
      check.rows("up", up, dtype, {rows, columns}),
      check.out_rows("dgate", dgate, dtype, {rows, columns}),
      check.out_rows("dup", dup, dtype, {rows, columns}),
      columns,
  };
  arguments.columns = columns_as_rows(gate, {arguments.dout, arguments.gate, arguments.up},
                                      {arguments.dgate, arguments.dup});
  parallel(kernels().swiglu.backward[format], arguments, gate.numel(), 5 * gate.element_size());
}

Two swiglu_backward(Tensor dout, Tensor gate, Tensor up) {
  const Check check("swiglu_backward");
  check.rank("gate", gate, 2);
  Tensor dgate = empty(gate, gate.scalar_type(), {gate.size(0), gate.size(1)});
  Tensor dup = empty(gate, gate.scalar_type(), {gate.size(0), gate.size(1)});
  swiglu_backward_into_(dout, gate, up, dgate, dup);
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
  std::vector<double> sums((pairs + kPairBlock - 1) / kPairBlock);
  const PairwiseLossForward arguments = {
      data<void>(chosen),
      data<void>(rejected),
      pointer(margin),
      sums.data(),
      static_cast<float*>(dchosen.mutable_data_ptr()),
      static_cast<float*>(drejected.mutable_data_ptr()),
      pairs,
      static_cast<float>(centering),
  };
  parallel(kernels().pairwise_loss.forward[format], arguments, sums.size(),
           kPairBlock * kBytesPerLogit);
  // In the order of the blocks, whatever the threads.
  double total = 0;
  for (double sum : sums) total += sum;
  *static_cast<float*>(loss.mutable_data_ptr()) = total / pairs;
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
  m.def("rope_into_(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool inverse,"
        " Tensor(a!) q_out, Tensor(b!) k_out) -> ()");
  m.def("swiglu_forward(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("swiglu_backward_into_(Tensor dout, Tensor gate, Tensor up, Tensor(a!) dgate,"
        " Tensor(b!) dup) -> ()");
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
  m.impl("rope_into_", TORCH_BOX(&fastllm::rope_into_));
  m.impl("swiglu_forward", TORCH_BOX(&fastllm::swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&fastllm::swiglu_backward));
  m.impl("swiglu_backward_into_", TORCH_BOX(&fastllm::swiglu_backward_into_));
  m.impl("linear_logprob_forward", TORCH_BOX(&fastllm::linear_logprob_forward));
  m.impl("linear_logprob_backward_", TORCH_BOX(&fastllm::linear_logprob_backward_));
  m.impl("pairwise_loss_forward", TORCH_BOX(&fastllm::pairwise_loss_forward));
}
