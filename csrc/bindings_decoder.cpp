// The decoder as Python sees it. Tensors and arrays come as addresses: whoever passes them keeps
// them alive, and checks their shapes (fastllm/generation/native_step.py).

#include "bindings_decoder.h"

#include <pybind11/stl.h>

#include "decoder.h"
#include "packing.h"

namespace py = pybind11;

namespace fastllm {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// [columns, depth, address of the panels, address of the scales, address of the bias]
Projection projection(Packing packing, const std::vector<Address>& p) {
  const PackedMatrix matrix = packed_matrix(packing, static_cast<int64_t>(p.at(0)),
                                            static_cast<int64_t>(p.at(1)), at<void>(p.at(2)),
                                            at<float>(p.at(3)));
  return {matrix, at<float>(p.at(4))};
}

DecoderLayer layer(Packing packing, const std::vector<std::vector<Address>>& projections,
                   const std::vector<Address>& norms, int64_t window) {
  auto p = [&](size_t i) { return projection(packing, projections.at(i)); };
  return {p(0), p(1), p(2), p(3), p(4), p(5), p(6), at<void>(norms.at(0)), at<void>(norms.at(1)),
          at<void>(norms.at(2)), at<void>(norms.at(3)), window, nullptr, nullptr};
}

// Fills a struct's fields from the entries of a dictionary.
class Fields {
 public:
  explicit Fields(const py::dict& from) : from_(from) {}

  template <class T>
  T* address(const char* name) const {
    return at<T>(from_[name].cast<Address>());
  }
  int64_t number(const char* name) const { return from_[name].cast<int64_t>(); }
  float fraction(const char* name) const { return from_[name].cast<float>(); }

 private:
  const py::dict& from_;
};

RunningRows running_rows(const Fields& f) {
  RunningRows r = {};
  r.token = f.address<int64_t>("token");
  r.position = f.address<int32_t>("position");
  r.tail_length = f.address<int32_t>("tail_length");
  r.count = f.address<int32_t>("count");
  r.group = f.address<int32_t>("group");
  r.tail_blocks = f.address<int32_t>("tail_blocks");
  r.tail_stride = f.number("tail_stride");
  r.prefix_blocks = f.address<int32_t>("prefix_blocks");
  r.prefix_stride = f.number("prefix_stride");
  r.prefix_length = f.address<int32_t>("prefix_length");
  r.max_count = f.address<int32_t>("max_count");
  SamplingRows& s = r.sampling;
  s.temperature = f.address<float>("temperature");
  s.top_p = f.address<float>("top_p");
  s.min_p = f.address<float>("min_p");
  s.repetition_penalty = f.address<float>("repetition_penalty");
  s.top_k = f.address<int32_t>("top_k");
  s.key = f.address<int64_t>("key");
  s.count = r.count;
  s.min_count = f.address<int32_t>("min_count");
  s.stop_tokens = f.address<int32_t>("stop_tokens");
  s.stop_stride = f.number("stop_stride");
  s.seen = f.address<uint8_t>("seen");
  s.seen_stride = f.number("seen_stride");
  return r;
}

DecoderShape decoder_shape(const Fields& f, Packing packing, const std::vector<Address>& head) {
  return {f.number("hidden"),
          f.number("heads"),
          f.number("key_heads"),
          f.number("head_size"),
          f.number("inner"),
          f.number("vocabulary"),
          f.fraction("eps"),
          f.fraction("scale"),
          static_cast<Format>(f.number("format")),
          static_cast<Format>(f.number("embedding_format")),
          f.address<void>("embedding"),
          f.address<void>("norm"),
          projection(packing, head).matrix};
}

// A decoder and the addresses that it was given last.
class BoundDecoder {
 public:
  BoundDecoder(const py::dict& shape, int packing, const std::vector<Address>& head,
               const std::vector<std::vector<std::vector<Address>>>& projections,
               const std::vector<std::vector<Address>>& norms, const std::vector<int64_t>& windows)
      : decoder_(decoder_shape(Fields(shape), static_cast<Packing>(packing), head),
                 layers(static_cast<Packing>(packing), projections, norms, windows)) {}

  void bind(const py::dict& running) { running_ = running_rows(Fields(running)); }

  void bind_cache(const std::vector<Address>& keys, const std::vector<Address>& values) {
    for (size_t i = 0; i < keys.size(); ++i) {
      decoder_.set_cache(i, at<void>(keys[i]), at<void>(values[i]));
    }
  }

  int64_t run(int64_t rows, int64_t steps, int64_t threads, Address cos, Address sin,
              Address token_ids, Address logprobs, Address sampling_logprobs) {
    return decoder_.run(running_, {at<float>(cos), at<float>(sin)}, rows, steps, threads,
                        {at<int64_t>(token_ids), at<float>(logprobs),
                         at<float>(sampling_logprobs)});
  }

 private:
  static std::vector<DecoderLayer> layers(
      Packing packing, const std::vector<std::vector<std::vector<Address>>>& projections,
      const std::vector<std::vector<Address>>& norms, const std::vector<int64_t>& windows) {
    std::vector<DecoderLayer> all;
    for (size_t i = 0; i < projections.size(); ++i) {
      all.push_back(layer(packing, projections[i], norms.at(i), windows.at(i)));
    }
    return all;
  }

  Decoder decoder_;
  RunningRows running_ = {};
};

}  // namespace

void bind_decoder(py::module_& module) {
  py::class_<BoundDecoder>(module, "Decoder",
                           "Draws tokens for running sequences; see generation/native_step.py.")
      .def(py::init<const py::dict&, int, const std::vector<Address>&,
                    const std::vector<std::vector<std::vector<Address>>>&,
                    const std::vector<std::vector<Address>>&, const std::vector<int64_t>&>())
      .def("bind", &BoundDecoder::bind)
      .def("bind_cache", &BoundDecoder::bind_cache)
      .def("run", &BoundDecoder::run, py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastllm
