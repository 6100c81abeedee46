// Runs the CPU kernels (csrc/cpu/kernels.cpp) by themselves on arrays that end where their elements do, so that a
// sanitizer sees an access past them: every storage format, lengths around a chunk's, tiles of all sides. With any
// argument, only lengths of whole chunks. Built by faults.py, run by test_sanitizers.py.
#include "cpu/kernels.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

namespace fused_adam::cpu {
namespace baseline {
KernelSet kernels();
}

namespace {

const Format kFormats[] = {Format::float32,
                           Format::bfloat16,
                           Format::float16,
                           Format::bfloat16_correction_16,
                           Format::bfloat16_correction_8,
                           Format::int8,
                           Format::uint8,
                           Format::int4,
                           Format::uint4};

size_t auxiliary_bytes(Format format, size_t n) {
  size_t corrections = n * correction_bytes(format);
  return corrections ? corrections : 2 * ((n + kBlockElements - 1) / kBlockElements);
}

// Exactly the bytes of n elements and of the format's auxiliary array, behind so many other elements. All zeros but for
// every third byte, a small number.
struct Array {
  Array(Format format, size_t n, size_t others = 0)
      : values(new char[bytes_of(format, others) + bytes_of(format, n)]()),
        auxiliary(new char[auxiliary_bytes(format, others) + auxiliary_bytes(format, n)]()),
        first_value(values.get() + bytes_of(format, others)),
        first_auxiliary(auxiliary.get() + auxiliary_bytes(format, others)) {
    for (size_t i = 0; i < bytes_of(format, n); i += 3) first_value[i] = char(i % 61);
  }
  Source source() const { return {first_value, first_auxiliary}; }
  Target target() const { return {first_value, first_auxiliary}; }
  std::unique_ptr<char[]> values, auxiliary;
  char *first_value, *first_auxiliary;
};

void update(const KernelSet& set, const TensorFormats& formats, size_t n, unsigned results, size_t others) {
  Array parameter(formats.parameter, n, others), gradient(formats.gradient, n, others), m(formats.m, n, others),
      v(formats.v, n, others);
  RunPointers run{parameter.source(), gradient.source(), m.source(), v.source(),
                  parameter.target(), m.target(),        v.target()};
  auto rounding = tensor_rounding({results, 1, 2}, 3, 4, formats.is_quantized());
  AdamConstants constants{0.9f, 0.1f, 0.999f, 0.001f, 1e-8f};
  for (auto kernel : {set.adam, set.keep}) {
    kernel(run, 0, n, formats, {1e-3f, 1.0f, 1.0f}, constants, rounding);
  }
}

template <typename Element>
void lay_out(Transpose transpose, Gather gather, size_t rows, size_t columns, size_t apart) {
  std::vector<Element> from(rows * columns), to((rows - 1) * (columns + apart) + columns);
  for (size_t i = 0; i < from.size(); ++i) from[i] = Element(i);
  auto source = reinterpret_cast<const char*>(from.data());
  auto target = reinterpret_cast<char*>(to.data());
  transpose(source, rows, rows, columns, target, columns + apart);
  std::vector<std::int64_t> offsets(from.size());
  for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = offsets.size() - 1 - i;
  gather(source, offsets.data(), offsets.size(), target);
}

}  // namespace
}  // namespace fused_adam::cpu

int main(int argument_count, char**) {
  using namespace fused_adam;
  using namespace fused_adam::cpu;
  auto set = baseline::kernels();
  for (size_t n = 1; n < 6 * kBlockElements; n += n % kBlockElements < 2 ? 1 : 10) {
    if (argument_count > 1 && n % kBlockElements > 0) continue;
    for (auto parameter : kFormats) {
      if (value_bits(parameter) < 16) continue;
      auto gradient = correction_bytes(parameter) ? Format::bfloat16 : parameter;
      for (auto state : {Format::float32, Format::bfloat16, Format::float16, Format::int8, Format::int4}) {
        auto v = state == Format::int8 ? Format::uint8 : state == Format::int4 ? Format::uint4 : state;
        for (unsigned results : {0, int(kRoundV), kRoundParameter | kRoundM | kRoundV}) {
          for (size_t others : {0, 1}) update(set, {parameter, gradient, state, v}, n, results, others);
        }
      }
    }
    for (auto from : {Format::float32, Format::bfloat16, Format::float16}) {
      set.sum_of_squares(Array(from, n).source(), from, n);
    }
    for (auto from : kFormats) {
      for (auto to : kFormats) {
        Array source(from, n), target(to, n);
        set.convert(source.source(), from, target.target(), to, n);
      }
    }
  }
  for (size_t rows = 1; rows < 40; rows += 3) {
    for (size_t columns = 1; columns < 40; columns += 5) {
      for (size_t apart : {0, 32}) {
        lay_out<std::uint16_t>(set.transpose_2_bytes, set.gather_2_bytes, rows, columns, apart);
        lay_out<std::uint32_t>(set.transpose_4_bytes, set.gather_4_bytes, rows, columns, apart);
      }
    }
  }
  std::puts("right");
}
