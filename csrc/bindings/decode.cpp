// The parts of a decoding step.
#include "cpu/decode.h"

#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/isa.h"
#include "engine/check.h"

namespace dive::bindings {

// Each function of csrc/cpu/decode.h alone, on a team of its own: for tests and benchmarks.
void bind_decode(py::module_ m) {
  using dive::cpu::Worker;
  namespace cpu = dive::cpu;
  // (data, dtype, scales, rows, columns, row stride, bias)
  using WeightTuple = std::tuple<Address, int, Address, std::int64_t, std::int64_t, std::int64_t, Address>;
  // (heads, key/value heads, head size, cache dtype, scale, softcap)
  using ShapeTuple = std::tuple<int, int, int, int, float, float>;
  // (blocks, bytes from a block's start to keys, to values, first, length)
  using RowTuple = std::tuple<std::vector<Address>, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  const auto weight = [](const WeightTuple& t) {
    return cpu::Weight{pointer<void>(std::get<0>(t)),
                       static_cast<cpu::DType>(std::get<1>(t)),
                       pointer<float>(std::get<2>(t)),
                       std::get<3>(t),
                       std::get<4>(t),
                       std::get<5>(t),
                       pointer<float>(std::get<6>(t))};
  };
  const auto shape = [](const ShapeTuple& t) {
    return cpu::AttentionShape{std::get<0>(t), std::get<1>(t), std::get<2>(t), static_cast<cpu::DType>(std::get<3>(t)),
                               std::get<4>(t), std::get<5>(t)};
  };
  // The rows point into `tuples`, whose addresses become pointers where they are.
  const auto cache_rows = [](const std::vector<RowTuple>& tuples) {
    static_assert(sizeof(Address) == sizeof(std::byte*));
    std::vector<cpu::CacheRow> rows;
    for (const auto& [blocks, keys, values, first, length] : tuples) {
      rows.push_back({reinterpret_cast<std::byte* const*>(blocks.data()), keys, values, first, length});
    }
    return rows;
  };
  const auto team = [](const std::string& isa, int threads, const std::function<void(const Worker&)>& body) {
    const cpu::Isa level = cpu::isa_from_name(isa);
    dive::engine::check_team(1, threads, level);
    const py::gil_scoped_release release;
    cpu::run_team(threads, level, body);
  };
  m.attr("CACHE_BLOCK") = cpu::kCacheBlock;
  m.attr("INT8_LINE") = std::make_tuple(cpu::kInt8Rows, cpu::kInt8Columns);
  m.def("project", [=](const std::vector<WeightTuple>& tuples, Address x, int batch, const std::vector<Address>& to,
                       bool accumulate, const std::string& isa, int threads) {
    std::vector<cpu::Weight> weights;
    std::vector<const cpu::Weight*> pointers;
    std::vector<float*> outputs;
    for (const WeightTuple& tuple : tuples) weights.push_back(weight(tuple));
    for (const cpu::Weight& w : weights) pointers.push_back(&w);
    for (const Address address : to) outputs.push_back(pointer<float>(address));
    team(isa, threads, [&](const Worker& worker) {
      cpu::project(worker, pointers.data(), static_cast<int>(pointers.size()), pointer<float>(x), batch, outputs.data(),
                   accumulate);
    });
  });
  m.def("project_gated", [=](int activation, const WeightTuple& gate, const WeightTuple& up, Address x, int batch,
                             Address out, const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::project_gated(worker, static_cast<cpu::GatedActivation>(activation), weight(gate), weight(up),
                         pointer<float>(x), batch, pointer<float>(out));
    });
  });
  m.def("quantize_int8",
        [=](const WeightTuple& tuple, Address out, Address scales, const std::string& isa, int threads) {
          dive::engine::check_team(1, threads, cpu::isa_from_name(isa));
          const py::gil_scoped_release release;
          cpu::quantize_int8(weight(tuple), pointer<std::int8_t>(out), pointer<float>(scales), cpu::isa_from_name(isa),
                             threads);
        });
  m.def("rms_norm", [=](Address x, Address norm_weight, float eps, std::int64_t rows, std::int64_t size, Address out,
                        const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::rms_norm(worker, pointer<float>(x), pointer<float>(norm_weight), eps, rows, size, pointer<float>(out));
    });
  });
  m.def("rope", [=](Address x, Address cos, Address sin, int batch, int heads, int head_size, const std::string& isa,
                    int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::rope(worker, pointer<float>(x), pointer<float>(cos), pointer<float>(sin), batch, heads, head_size);
    });
  });
  m.def("append_to_cache", [=](const ShapeTuple& tuple, Address keys, Address values,
                               const std::vector<RowTuple>& tuples, const std::string& isa, int threads) {
    const std::vector<cpu::CacheRow> rows = cache_rows(tuples);
    team(isa, threads, [&](const Worker& worker) {
      cpu::append_to_cache(worker, shape(tuple), pointer<float>(keys), pointer<float>(values), rows.data(),
                           static_cast<int>(rows.size()));
    });
  });
  m.def("attention", [=](const ShapeTuple& tuple, Address q, const std::vector<RowTuple>& tuples, Address out,
                         const std::string& isa, int threads) {
    const std::vector<cpu::CacheRow> rows = cache_rows(tuples);
    team(isa, threads, [&](const Worker& worker) {
      cpu::attention(worker, shape(tuple), pointer<float>(q), rows.data(), static_cast<int>(rows.size()),
                     pointer<float>(out));
    });
  });
  m.def("gated_activation", [=](int activation, Address gate, Address up, std::int64_t count, Address out,
                                const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::gated_activation(worker, static_cast<cpu::GatedActivation>(activation), pointer<float>(gate),
                            pointer<float>(up), count, pointer<float>(out));
    });
  });
  m.def("add", [=](Address a, Address b, std::int64_t count, Address out, const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::add(worker, pointer<float>(a), pointer<float>(b), count, pointer<float>(out));
    });
  });
  m.def("softcap", [=](Address x, std::int64_t count, float cap, const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) { cpu::softcap(worker, pointer<float>(x), count, cap); });
  });
  m.def("embed", [=](const WeightTuple& embedding, Address tokens, int batch, float scale, Address out,
                     const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::embed(worker, weight(embedding), pointer<std::int64_t>(tokens), batch, scale, pointer<float>(out));
    });
  });
  m.def("argmax",
        [=](Address logits, int batch, std::int64_t vocabulary, Address found, const std::string& isa, int threads) {
          team(isa, threads, [&](const Worker& worker) {
            cpu::argmax(worker, pointer<float>(logits), batch, vocabulary, pointer<std::int64_t>(found));
          });
        });
  m.def("read_memory", [](Address data, std::int64_t bytes, const std::string& isa, int threads) {
    dive::engine::check_team(1, threads, cpu::isa_from_name(isa));
    const py::gil_scoped_release release;
    return cpu::read_memory(pointer<void>(data), bytes, cpu::isa_from_name(isa), threads);
  });
  m.def("digest_memory", [](Address data, std::int64_t bytes, const std::string& isa, int threads) {
    dive::engine::check_team(1, threads, cpu::isa_from_name(isa));
    const py::gil_scoped_release release;
    return cpu::digest_memory(pointer<void>(data), bytes, cpu::isa_from_name(isa), threads);
  });
  m.def("syncs", [=](int count, const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      for (int i = 0; i < count; ++i) worker.sync();
    });
  });
}

}  // namespace dive::bindings
