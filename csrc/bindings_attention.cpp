// attention and decode_attention as PyTorch sees them: argument checks, memory, and the division
// of the work into tasks.

#include "bindings.h"

namespace fastllm {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// Offsets [n + 1] of n lists that lie one after another and end at `total`.
void check_offsets(const Check& check, const char* name, const Tensor& offsets, int64_t lists,
                   int64_t total) {
  check.tensor(name, offsets, ScalarType::Int, {lists + 1});
  const int32_t* offset = data<int32_t>(offsets);
  bool fits = offset[0] == 0 && offset[lists] == total;
  for (int64_t i = 0; i < lists; ++i) fits = fits && offset[i] <= offset[i + 1];
  check.require(fits, std::string(name) + " must ascend from 0 to " + std::to_string(total));
}

// Indices in [low, high).
void check_indices(const Check& check, const char* name, const Tensor& indices, int64_t count,
                   int64_t low, int64_t high) {
  check.tensor(name, indices, ScalarType::Int, {count});
  const int32_t* index = data<int32_t>(indices);
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] >= low && index[i] < high) continue;
    check.fail(std::string(name) + " must lie in " + std::to_string(low) + ".." +
               std::to_string(high - 1) + ", found " + std::to_string(index[i]) + " at " +
               std::to_string(i));
  }
}

void check_head_size(const Check& check, int64_t head_size) {
  check.require(head_size % 2 == 0 && head_size >= 2 && head_size <= kMaxHeadSize,
                "the head size must be even and at most " + std::to_string(kMaxHeadSize) +
                    ", found " + std::to_string(head_size));
}

struct Shapes {
  int64_t queries, tokens, heads, key_heads, head_size;
};

Shapes check_heads(const Check& check, const Tensor& q, const char* k_name, const Tensor& k,
                   const char* v_name, const Tensor& v) {
  check.rank("q", q, 3);
  check.rank(k_name, k, 3);
  const Shapes s = {q.size(0), k.size(0), q.size(1), k.size(1), q.size(2)};
  const ScalarType dtype = q.scalar_type();
  check.tensor("q", q, dtype, {s.queries, s.heads, s.head_size});
  check.tensor(k_name, k, dtype, {s.tokens, s.key_heads, s.head_size});
  check.tensor(v_name, v, dtype, {s.tokens, s.key_heads, s.head_size});
  check_head_size(check, s.head_size);
  check.require(s.key_heads > 0 && s.heads % s.key_heads == 0,
                std::to_string(s.heads) + " query heads do not divide over " +
                    std::to_string(s.key_heads) + " key heads");
  return s;
}

Layout check_layout(const Check& check, const Shapes& s, const Tensor& starts, const Tensor& prefix,
                    const Tensor& positions, const Tensor& query_rows, const Tensor& query_starts) {
  check.rank("prefix", prefix, 1);
  const int64_t segments = prefix.size(0);
  check_offsets(check, "starts", starts, segments, s.tokens);
  check_indices(check, "prefix", prefix, segments, -1, segments);
  check.tensor("positions", positions, ScalarType::Int, {s.tokens});
  check_indices(check, "query_rows", query_rows, s.queries, 0, s.tokens);
  check_offsets(check, "query_starts", query_starts, segments, s.queries);
  Layout layout = {};
  layout.segments = segments;
  layout.starts = data<int32_t>(starts);
  layout.prefix = data<int32_t>(prefix);
  layout.positions = data<int32_t>(positions);
  layout.query_rows = data<int32_t>(query_rows);
  layout.query_starts = data<int32_t>(query_starts);
  return layout;
}

void check_children(const Check& check, Layout& layout, const Tensor& children_starts,
                    const Tensor& children) {
  check.rank("children", children, 1);
  check_indices(check, "children", children, children.size(0), 0, layout.segments);
  check_offsets(check, "children_starts", children_starts, layout.segments, children.size(0));
  layout.children_starts = data<int32_t>(children_starts);
  layout.children = data<int32_t>(children);
}

// ---- attention ------------------------------------------------------------------------------

// Blocks of rows of every segment and key head, for segments that lie between `starts` and have
// `rows_each` rows for each unit of length.
std::vector<AttentionTask> block_tasks(const Layout& layout, const Shapes& s, const int32_t* starts,
                                       int64_t rows_each, int64_t block) {
  std::vector<AttentionTask> tasks;
  for (int32_t segment = 0; segment < layout.segments; ++segment) {
    const int64_t rows = (starts[segment + 1] - starts[segment]) * rows_each;
    for (int32_t head = 0; head < s.key_heads; ++head) {
      for (int64_t first = 0; first < rows; first += block) {
        tasks.push_back({segment, head, static_cast<int32_t>(first)});
      }
    }
  }
  return tasks;
}

std::vector<AttentionTask> query_tasks(const Layout& layout, const Shapes& s) {
  return block_tasks(layout, s, layout.query_starts, s.heads / s.key_heads,
                     kernels().attention.query_rows_per_task);
}

std::vector<AttentionTask> key_tasks(const Layout& layout, const Shapes& s) {
  return block_tasks(layout, s, layout.starts, 1, kernels().attention.keys_per_task);
}

// Every root segment, with its children, and key head.
std::vector<AttentionTask> family_tasks(const Layout& layout, const Shapes& s) {
  std::vector<AttentionTask> tasks;
  for (int32_t segment = 0; segment < layout.segments; ++segment) {
    if (layout.prefix[segment] >= 0) continue;
    for (int32_t head = 0; head < s.key_heads; ++head) tasks.push_back({segment, head, 0});
  }
  return tasks;
}

Two attention_forward(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor prefix, Tensor positions,
                      Tensor query_rows, Tensor query_starts, double scale, int64_t window) {
  const Check check("attention_forward");
  const Format format = check.format("q", q);
  const Shapes s = check_heads(check, q, "k", k, "v", v);
  const Layout layout = check_layout(check, s, starts, prefix, positions, query_rows, query_starts);

  const auto tasks = query_tasks(layout, s);
  Tensor out = like(q);
  Tensor lse = empty(q, ScalarType::Float, {s.queries, s.heads});
  const AttentionForward arguments = {
      data<void>(q),
      data<void>(k),
      data<void>(v),
      out.mutable_data_ptr(),
      static_cast<float*>(lse.mutable_data_ptr()),
      layout,
      tasks.data(),
      s.heads,
      s.key_heads,
      s.head_size,
      static_cast<float>(scale),
      window,
  };
  parallel_tasks(kernels().attention.forward[format], arguments, tasks.size());
  return {out, lse};
}

// The sums of dout * out over each head.
Tensor attention_delta(const Tensor& dout, const Tensor& out, const Tensor& lse, Format format,
                       int64_t head_size) {
  Tensor delta = like(lse);
  const AttentionDelta arguments = {data<void>(dout), data<void>(out),
                                    static_cast<float*>(delta.mutable_data_ptr()), head_size};
  parallel(kernels().attention.delta[format], arguments, lse.numel(),
           2 * head_size * dout.element_size());
  return delta;
}

// Families leave threads without work where they are few: then the two parts, for 7/5 of the work.
bool few_families(int64_t families) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rounds = (families + threads - 1) / threads;
  return 7 * families < 5 * rounds * threads;
}

void run_backward(AttentionBackward& arguments, const Shapes& s, Format format) {
  const AttentionKernels& kernel = kernels().attention;
  auto run = [&](const std::vector<AttentionTask>& tasks, Kernel<AttentionBackward> part) {
    arguments.tasks = tasks.data();
    parallel_tasks(part, arguments, tasks.size());
  };
  const auto families = family_tasks(arguments.layout, s);
  if (few_families(families.size())) {
    run(key_tasks(arguments.layout, s), kernel.backward_keys[format]);
    run(query_tasks(arguments.layout, s), kernel.backward_queries[format]);
  } else {
    run(families, kernel.backward[format]);
  }
}

Three attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                         Tensor starts, Tensor prefix, Tensor positions, Tensor query_rows,
                         Tensor query_starts, Tensor children_starts, Tensor children, double scale,
                         int64_t window) {
  const Check check("attention_backward");
  const Format format = check.format("q", q);
  const Shapes s = check_heads(check, q, "k", k, "v", v);
  check.tensor("dout", dout, q.scalar_type(), {s.queries, s.heads, s.head_size});
  check.tensor("out", out, q.scalar_type(), {s.queries, s.heads, s.head_size});
  check.tensor("lse", lse, ScalarType::Float, {s.queries, s.heads});
  Layout layout = check_layout(check, s, starts, prefix, positions, query_rows, query_starts);
  check_children(check, layout, children_starts, children);

  const Tensor delta = attention_delta(dout, out, lse, format, s.head_size);
  Tensor dq_sum = zeros(q, ScalarType::Float, {s.queries, s.heads, s.head_size});
  Tensor dq = format == kFloat32 ? dq_sum : like(q);
  Tensor dk = like(k), dv = like(v);
  AttentionBackward arguments = {
      data<void>(q),
      data<void>(k),
      data<void>(v),
      data<void>(dout),
      data<float>(lse),
      data<float>(delta),
      static_cast<float*>(dq_sum.mutable_data_ptr()),
      dq.mutable_data_ptr(),
      dk.mutable_data_ptr(),
      dv.mutable_data_ptr(),
      layout,
      nullptr,
      s.heads,
      s.key_heads,
      s.head_size,
      static_cast<float>(scale),
      window,
  };
  run_backward(arguments, s, format);
  return {dq, dk, dv};
}

// ---- decode_attention -----------------------------------------------------------------------

// Runs of neighbouring sequences with the same prompt, cut into blocks of query rows. A block is at
// most a thread's share of all rows, so that one large group keeps every thread busy.
std::vector<DecodeTask> decode_tasks(const int32_t* group, const Shapes& s, int64_t most_rows) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t heads = s.heads / s.key_heads;
  const int64_t share = (s.queries * s.heads + threads - 1) / threads;
  const int64_t block = std::clamp<int64_t>(share, heads, std::max(heads, most_rows));
  std::vector<DecodeTask> tasks;
  for (int64_t begin = 0, end; begin < s.queries; begin = end) {
    for (end = begin + 1; end < s.queries && group[end] == group[begin];) ++end;
    for (int32_t head = 0; head < s.key_heads; ++head) {
      for (int64_t row = begin * heads; row < end * heads; row += std::min(block, most_rows)) {
        const int64_t rows = std::min({block, most_rows, end * heads - row});
        tasks.push_back({static_cast<int32_t>(row), static_cast<int32_t>(rows), head});
      }
    }
  }
  return tasks;
}

Tensor decode_attention_forward(Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor prefix_starts,
                                Tensor group, Tensor tail_k, Tensor tail_v, Tensor tail_rows,
                                Tensor tail_lengths, double scale, int64_t window) {
  const Check check("decode_attention_forward");
  const Format format = check.format("q", q);
  const ScalarType dtype = q.scalar_type();
  check.rank("prefix_starts", prefix_starts, 1);
  check.rank("tail_k", tail_k, 4);
  const int64_t groups = prefix_starts.size(0) - 1;
  const int64_t tails = tail_k.size(0), capacity = tail_k.size(1);
  const Shapes s = check_heads(check, q, "prefix_k", prefix_k, "prefix_v", prefix_v);
  check.tensor("tail_k", tail_k, dtype, {tails, capacity, s.key_heads, s.head_size});
  check.tensor("tail_v", tail_v, dtype, {tails, capacity, s.key_heads, s.head_size});
  check_offsets(check, "prefix_starts", prefix_starts, groups, s.tokens);
  check_indices(check, "group", group, s.queries, 0, groups);
  check_indices(check, "tail_rows", tail_rows, s.queries, 0, tails);
  check_indices(check, "tail_lengths", tail_lengths, s.queries, 0, capacity + 1);

  const DecodeAttentionKernels& kernel = kernels().decode_attention;
  const auto tasks = decode_tasks(data<int32_t>(group), s, kernel.query_rows_per_task);
  Tensor out = like(q);
  const DecodeAttentionForward arguments = {
      data<void>(q),
      data<void>(prefix_k),
      data<void>(prefix_v),
      data<int32_t>(prefix_starts),
      data<int32_t>(group),
      data<void>(tail_k),
      data<void>(tail_v),
      data<int32_t>(tail_rows),
      data<int32_t>(tail_lengths),
      out.mutable_data_ptr(),
      tasks.data(),
      s.heads,
      s.key_heads,
      s.head_size,
      capacity,
      static_cast<float>(scale),
      window,
  };
  parallel_tasks(kernel.forward[format], arguments, tasks.size());
  return out;
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor prefix,"
        " Tensor positions, Tensor query_rows, Tensor query_starts, float scale, int window)"
        " -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        " Tensor starts, Tensor prefix, Tensor positions, Tensor query_rows, Tensor query_starts,"
        " Tensor children_starts, Tensor children, float scale, int window)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("decode_attention_forward(Tensor q, Tensor prefix_k, Tensor prefix_v,"
        " Tensor prefix_starts, Tensor group, Tensor tail_k, Tensor tail_v, Tensor tail_rows,"
        " Tensor tail_lengths, float scale, int window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastllm::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastllm::attention_backward));
  m.impl("decode_attention_forward", TORCH_BOX(&fastllm::decode_attention_forward));
}
