// Runs the kernels of one instruction set against scalar code in fp64. For processors that the
// tests do not run on: built by a cross compiler, run by an emulator (test_cross_compile.py).

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

using namespace fastllm;
using Numbers = std::vector<float>;

int failures = 0;

// Largest difference, relative to 1 or to the number itself.
void expect_close(const char* what, const Numbers& found, const std::vector<double>& expected,
                  double tolerance) {
  for (size_t i = 0; i < found.size(); ++i) {
    const double error = std::fabs(found[i] - expected[i]) / std::fmax(1.0, std::fabs(expected[i]));
    if (error <= tolerance) continue;
    std::printf("%s[%zu]: expected %.9g, found %.9g\n", what, i, expected[i], found[i]);
    ++failures;
    return;
  }
}

Numbers numbers(size_t count, float spread, uint32_t seed) {
  Numbers result(count);
  for (float& x : result) {
    seed = seed * 1664525u + 1013904223u;
    x = (static_cast<float>(seed >> 8) / (1 << 23) - 1.0f) * spread;
  }
  return result;
}

float scalar_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

double scalar_fp16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24)
                                         : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// A rotation by nothing copies: every finite number of a format goes through fp32 and back.
void check_conversions(Format format, uint16_t infinity) {
  std::vector<uint16_t> in(1 << 16), out(1 << 16, 1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i);
  const int64_t half = in.size() / 2;
  const Numbers cos(half, 1.0f), sin(half, 0.0f);
  // Pairs (a, b) where b is infinite or NaN would spoil a: rotate a lower half with zeros.
  for (int64_t i = 0; i < half; ++i) {
    if ((in[i] & infinity) == infinity) in[i] = 0;
    if ((in[half + i] & infinity) == infinity) in[half + i] = 0;
  }
  const int32_t position = 0;
  const int64_t size = in.size();
  const Heads q = {in.data(), size, size, out.data(), size, size, 1};
  const Heads none = {in.data(), 0, 0, out.data(), 0, 0, 0};
  baseline::rope.forward[format]({q, none, cos.data(), sin.data(), &position, size, false}, 0, 1);
  for (size_t i = 0; i < in.size(); ++i) {
    const bool same = out[i] == in[i] || ((out[i] | in[i]) & 0x7fff) == 0;
    if (same) continue;
    std::printf("format %d: %04x became %04x\n", format, in[i], out[i]);
    ++failures;
    return;
  }
}

// What a narrow store rounds to, against the definition: the nearest number.
void check_rounding(Format format) {
  const bool brain = format == kBFloat16;
  const uint16_t infinity = brain ? 0x7f80 : 0x7c00, hundred = brain ? 0x42c8 : 0x5640;
  const double overflow = brain ? std::ldexp(2 - 1.0 / 256, 127) : 65520;
  const auto value = [&](uint16_t bits) { return brain ? scalar_bf16(bits) : scalar_fp16(bits); };
  const int64_t count = infinity / 7;
  std::vector<uint16_t> gate(count, hundred), up(count), out(count);  // sigmoid(100) is 1
  for (int64_t i = 0; i < count; ++i) up[i] = static_cast<uint16_t>(i * 7 + (i % 2) * 0x8000);
  const Rows gates = {gate.data(), count}, ups = {up.data(), count};
  baseline::swiglu.forward[format]({gates, ups, {out.data(), count}, count}, 0, count);
  for (int64_t i = 0; i < count; ++i) {
    const double exact = 100.0 * value(up[i]), error = std::fabs(value(out[i]) - exact);
    const uint16_t magnitude = out[i] & 0x7fff;
    const auto nearer = [&](int step) {
      const uint16_t other = static_cast<uint16_t>(out[i] + step);
      return (other & 0x7fff) < infinity && std::fabs(value(other) - exact) < error;
    };
    const bool right = std::fabs(exact) >= overflow ? magnitude == infinity
                       : magnitude == 0             ? !nearer(1)
                                                    : !nearer(1) && !nearer(-1);
    if (right) continue;
    std::printf("format %d: 100 * %04x became %04x\n", format, up[i], out[i]);
    ++failures;
    return;
  }
}

void check_swiglu() {
  const int64_t rows = 5, columns = 19, stride = 40;
  const Numbers both = numbers(rows * stride, 30.0f, 1), dout = numbers(columns, 1.0f, 2);
  Numbers out(rows * columns), dboth(rows * stride);
  const Rows gate = {both.data(), stride}, up = {both.data() + columns, stride};
  baseline::swiglu.forward[kFloat32]({gate, up, {out.data(), columns}, columns}, 0,
                                     rows * columns);
  baseline::swiglu.backward[kFloat32](
      {{dout.data(), 0}, gate, up, {dboth.data(), stride}, {dboth.data() + columns, stride}, columns},
      0, rows * columns);
  std::vector<double> expected(out.size()), gradients(dboth.size());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      const double g = both[row * stride + i], u = both[row * stride + columns + i];
      const double s = 1 / (1 + std::exp(-g)), d = dout[i];
      expected[row * columns + i] = g * s * u;
      gradients[row * stride + i] = d * u * (s + g * s * (1 - s));
      gradients[row * stride + columns + i] = d * g * s;
    }
  }
  expect_close("swiglu", out, expected, 1e-6);
  expect_close("swiglu gradient", dboth, gradients, 2e-6);
}

void check_rms_norm() {
  const int64_t rows = 7, columns = 37;
  const Numbers x = numbers(rows * columns, 2, 3), r = numbers(rows * columns, 2, 4);
  const Numbers weight = numbers(columns, 2, 5), dy = numbers(rows * columns, 1, 6);
  Numbers y(x.size()), h(x.size()), rstd(rows), dx(x.size()), dweight(columns);
  baseline::rms_norm.forward[kFloat32]({{x.data(), columns},
                                        {r.data(), columns},
                                        weight.data(),
                                        {y.data(), columns},
                                        {h.data(), columns},
                                        rstd.data(),
                                        columns,
                                        1e-6f},
                                       0, rows);
  baseline::rms_norm.backward[kFloat32]({{dy.data(), columns},
                                         {nullptr, 0},
                                         {h.data(), columns},
                                         weight.data(),
                                         rstd.data(),
                                         {dx.data(), columns},
                                         dweight.data(),
                                         rows,
                                         columns,
                                         rows},
                                        0, 1);
  std::vector<double> out(x.size()), gradient(x.size()), of_weight(columns);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row * columns;
    double squares = 0, products = 0;
    for (int64_t i = 0; i < columns; ++i) {
      const double sum = static_cast<double>(x[first + i]) + r[first + i];
      squares += sum * sum;
      products += sum * dy[first + i] * weight[i];
    }
    const double scale = 1 / std::sqrt(squares / columns + 1e-6);
    for (int64_t i = 0; i < columns; ++i) {
      const double sum = static_cast<double>(x[first + i]) + r[first + i];
      out[first + i] = sum * scale * weight[i];
      gradient[first + i] = scale * (static_cast<double>(dy[first + i]) * weight[i] -
                                     sum * scale * scale * products / columns);
      of_weight[i] += dy[first + i] * sum * scale;
    }
  }
  expect_close("rms_norm", y, out, 2e-6);
  expect_close("rms_norm gradient", dx, gradient, 2e-6);
  expect_close("rms_norm gradient of the weight", dweight, of_weight, 3e-6);
}

void check_linear_logprob() {
  const int64_t vocabulary = 1501, target = 77;
  const Numbers logits = numbers(vocabulary, 12, 7);
  Numbers found(3);
  baseline::linear_logprob.forward[kFloat32](
      {logits.data(), &target, &found[0], &found[1], &found[2], vocabulary, 0.7f, 5.0f}, 0, 1);
  std::vector<double> z(vocabulary);
  double sum = 0, weighted = 0;
  for (int64_t i = 0; i < vocabulary; ++i) {
    z[i] = 5 * std::tanh(logits[i] / 5.0) / 0.7f;
    sum += std::exp(z[i]);
    weighted += std::exp(z[i]) * z[i];
  }
  const double lse = std::log(sum), entropy = lse - weighted / sum;
  expect_close("linear_logprob", found, {z[target] - lse, entropy, lse}, 2e-6);

  Numbers gradient = logits;
  const float dlogp = 0.9f, dentropy = -0.4f;
  baseline::linear_logprob.backward[kFloat32]({gradient.data(), &target, &found[2], &found[1],
                                               &dlogp, &dentropy, vocabulary, 0.7f, 5.0f},
                                              0, 1);
  std::vector<double> expected(vocabulary);
  for (int64_t i = 0; i < vocabulary; ++i) {
    const double p = std::exp(z[i] - lse), cosh = std::cosh(logits[i] / 5.0);
    const double dz = dlogp * ((i == target) - p) - dentropy * p * (z[i] - lse + entropy);
    expected[i] = dz / (0.7f * cosh * cosh);
  }
  expect_close("linear_logprob gradient", gradient, expected, 2e-6);
}

void check_optimizer() {
  const int64_t count = 70;
  Numbers p = numbers(count, 1, 8), m = numbers(count, 1, 9), v = numbers(count, 1, 10);
  const Numbers g = numbers(count, 1, 11);
  for (float& x : v) x = std::fabs(x);
  std::vector<double> expected(count);
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double d = 0.5 * g[i], mean = 0.9 * m[i] + 0.1 * d, square = 0.99 * v[i] + 0.01 * d * d;
    expected[i] = p[i] - p[i] * 1e-3 - 0.01 * mean / (std::sqrt(square) * 1.5 + 1e-8);
    squares += static_cast<double>(g[i]) * g[i];
  }
  double found = 0;
  baseline::optimizer.square_sum({g.data(), count, &found}, 0, 1);
  baseline::optimizer.adamw({p.data(), g.data(), m.data(), v.data(), count, 0.5f, 0.1f, 0.99f,
                             0.01f, 1e-3f, 0.01f, 1.5f, 1e-8f},
                            0, 1);
  expect_close("adamw", p, expected, 2e-6);
  expect_close("square_sum", {static_cast<float>(found)}, {squares}, 1e-6);
}

}  // namespace

int main() {
  check_conversions(kBFloat16, 0x7f80);
  check_conversions(kFloat16, 0x7c00);
  check_rounding(kBFloat16);
  check_rounding(kFloat16);
  check_swiglu();
  check_rms_norm();
  check_linear_logprob();
  check_optimizer();
  if (failures == 0) std::printf("all right\n");
  return failures;
}
