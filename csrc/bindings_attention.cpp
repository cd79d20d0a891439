// attention as PyTorch sees it: argument checks, memory, and the division of the work into tasks.

#include "bindings_attention.h"

namespace fastllm {
namespace {

using Two = std::tuple<Tensor, Tensor>;

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

// ---- Forward --------------------------------------------------------------------------------

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

Two attention_forward(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor prefix, Tensor positions,
                      Tensor query_rows, Tensor query_starts, double scale, int64_t window) {
  const Check check("attention_forward");
  const Format format = check.format("q", q);
  const Inputs inputs = check_heads(check, q, "k", k, "v", v);
  const Shapes& s = inputs.shapes;
  const Layout layout = check_layout(check, s, starts, prefix, positions, query_rows, query_starts);

  const auto tasks = query_tasks(layout, s);
  Tensor out = empty(q, q.scalar_type(), {s.queries, s.heads, s.head_size});
  Tensor lse = empty(q, ScalarType::Float, {s.queries, s.heads});
  const AttentionForward arguments = {
      inputs.q,
      inputs.k,
      inputs.v,
      new_head_rows(out),
      static_cast<float*>(lse.mutable_data_ptr()),
      layout,
      tasks.data(),
      s.heads,
      s.key_heads,
      s.head_size,
      static_cast<float>(scale),
      window,
  };
  parallel_tasks(kernel_for(format, kernels().attention.forward), arguments, tasks.size());
  return {out, lse};
}

// ---- Backward -------------------------------------------------------------------------------

// About how many scores a segment's queries have with a key head.
int64_t scores_of(const Layout& layout, int64_t segment, int64_t window) {
  const int64_t queries = layout.query_starts[segment + 1] - layout.query_starts[segment];
  const int64_t own = layout.starts[segment + 1] - layout.starts[segment];
  const int32_t prefix = layout.prefix[segment];
  const int64_t before = prefix < 0 ? 0 : layout.starts[prefix + 1] - layout.starts[prefix];
  const int64_t keys = before + (own + 1) / 2;
  return queries * (window > 0 ? std::min(window, keys) : keys);
}

// A root segment with its children.
struct Family {
  int32_t root;
  int64_t scores;
};

// The largest come first, so that no thread is left alone with one of them at the end.
std::vector<Family> families_of(const Layout& layout, int64_t window) {
  std::vector<Family> families;
  for (int32_t root = 0; root < layout.segments; ++root) {
    if (layout.prefix[root] >= 0) continue;
    Family family = {root, scores_of(layout, root, window)};
    for (int32_t c = layout.children_starts[root]; c < layout.children_starts[root + 1]; ++c) {
      family.scores += scores_of(layout, layout.children[c], window);
    }
    families.push_back(family);
  }
  std::stable_sort(families.begin(), families.end(),
                   [](const Family& a, const Family& b) { return a.scores > b.scores; });
  return families;
}

// Families leave threads without work where they are few or one is large: then the two parts, for
// 7/5 of the work.
bool divides_badly(const std::vector<Family>& families, int64_t key_heads) {
  std::vector<int64_t> load(torch::stable::get_num_threads());
  int64_t total = 0;
  for (const Family& family : families) {
    for (int64_t head = 0; head < key_heads; ++head) {
      *std::min_element(load.begin(), load.end()) += family.scores;
      total += family.scores;
    }
  }
  const int64_t longest = *std::max_element(load.begin(), load.end());
  return 5 * longest * static_cast<int64_t>(load.size()) > 7 * total;
}

std::vector<AttentionTask> family_tasks(const std::vector<Family>& families, const Shapes& s) {
  std::vector<AttentionTask> tasks;
  for (const Family& family : families) {
    for (int32_t head = 0; head < s.key_heads; ++head) tasks.push_back({family.root, head, 0});
  }
  return tasks;
}

void run_backward(AttentionBackward& arguments, const Shapes& s, Format format) {
  const AttentionKernels& kernel = kernels().attention;
  auto run = [&](const std::vector<AttentionTask>& tasks, Kernel<AttentionBackward> part) {
    arguments.tasks = tasks.data();
    parallel_tasks(part, arguments, tasks.size());
  };
  const auto families = families_of(arguments.layout, arguments.window);
  if (divides_badly(families, s.key_heads)) {
    run(query_tasks(arguments.layout, s), kernel_for(format, kernel.backward_queries));
    run(key_tasks(arguments.layout, s), kernel_for(format, kernel.backward_keys));
  } else {
    run(family_tasks(families, s), kernel_for(format, kernel.backward));
  }
}

// Heads [rows, heads, size] that are written, and must not share memory.
OutHeadRows check_out_heads(const Check& check, const char* name, Tensor& tensor, ScalarType dtype,
                            std::initializer_list<int64_t> shape) {
  const HeadRows heads = check_head_rows(check, name, tensor, dtype, shape);
  const bool heads_apart = tensor.size(1) < 2 || heads.head_stride >= tensor.size(2);
  const bool rows_apart =
      tensor.size(0) < 2 ||
      heads.row_stride >= (tensor.size(1) - 1) * heads.head_stride + tensor.size(2);
  check.require(heads_apart && rows_apart,
                std::string(name) + " must not overlap itself, found strides of " +
                    shape_name(tensor.strides()) + " for " + shape_name(tensor.sizes()));
  return {tensor.mutable_data_ptr(), heads.row_stride, heads.head_stride};
}

// Writes the gradients to tensors that may be parts of a larger one.
void attention_backward_into_(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                              Tensor starts, Tensor prefix, Tensor positions, Tensor query_rows,
                              Tensor query_starts, Tensor children_starts, Tensor children,
                              double scale, int64_t window, Tensor dq, Tensor dk, Tensor dv) {
  const Check check("attention_backward_into_");
  const Format format = check.format("q", q);
  const ScalarType dtype = q.scalar_type();
  const Inputs inputs = check_heads(check, q, "k", k, "v", v);
  const Shapes& s = inputs.shapes;
  check.tensor("lse", lse, ScalarType::Float, {s.queries, s.heads});
  Layout layout = check_layout(check, s, starts, prefix, positions, query_rows, query_starts);
  check_children(check, layout, children_starts, children);

  Tensor delta = like(lse);
  AttentionBackward arguments = {
      inputs.q,
      inputs.k,
      inputs.v,
      check_head_rows(check, "dout", dout, dtype, {s.queries, s.heads, s.head_size}),
      check_head_rows(check, "out", out, dtype, {s.queries, s.heads, s.head_size}),
      data<float>(lse),
      static_cast<float*>(delta.mutable_data_ptr()),
      check_out_heads(check, "dq", dq, dtype, {s.queries, s.heads, s.head_size}),
      check_out_heads(check, "dk", dk, dtype, {s.tokens, s.key_heads, s.head_size}),
      check_out_heads(check, "dv", dv, dtype, {s.tokens, s.key_heads, s.head_size}),
      layout,
      nullptr,
      s.heads,
      s.key_heads,
      s.head_size,
      static_cast<float>(scale),
      window,
  };
  run_backward(arguments, s, format);
}

}  // namespace
}  // namespace fastllm

STABLE_TORCH_LIBRARY_FRAGMENT(fastllm, m) {
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor prefix,"
        " Tensor positions, Tensor query_rows, Tensor query_starts, float scale, int window)"
        " -> (Tensor, Tensor)");
  m.def("attention_backward_into_(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,"
        " Tensor lse, Tensor starts, Tensor prefix, Tensor positions, Tensor query_rows,"
        " Tensor query_starts, Tensor children_starts, Tensor children, float scale, int window,"
        " Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastllm::attention_forward));
  m.impl("attention_backward_into_", TORCH_BOX(&fastllm::attention_backward_into_));
}
