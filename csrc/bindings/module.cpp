// What the module consists of, and what machine it runs on.
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/features.h"
#include "cpu/isa.h"
#include "cuda/device.h"

namespace dive::bindings {
namespace {

py::dict to_python(const dive::cuda::Status& status) {
  return py::dict("ok"_a = status.ok, "message"_a = status.message);
}

py::dict to_python(const dive::cuda::Device& device) {
  return py::dict("index"_a = device.index, "name"_a = device.name,
                  "capability"_a = py::make_tuple(device.major, device.minor), "total_memory"_a = device.total_memory,
                  "sm_count"_a = device.sm_count, "covered"_a = to_python(device.covered));
}

void bind_cpu(py::module_ m) {
  m.def("brand", &dive::cpu::brand, "Marketing name of the processor.");
  m.def("instruction_sets", &dive::cpu::instruction_sets,
        "Instruction sets usable at run time, named as in /proc/cpuinfo.");
  m.def("bf16_products_are_quick", &dive::cpu::bf16_products_are_quick,
        "Whether products of bfloat16 take no longer here than those of float32; None where it is not known.");
  m.def(
      "kernel_levels",
      [] {
        std::vector<std::string> names;
        for (const dive::cpu::Isa isa : dive::cpu::usable_isas()) names.emplace_back(dive::cpu::isa_name(isa));
        return names;
      },
      "Levels that kernels can run at here, the best one last.");
  m.def(
      "cores",
      [] {
        const dive::cpu::Cores cores = dive::cpu::cores();
        return py::dict("logical"_a = cores.logical, "physical"_a = cores.physical);
      },
      "Hardware threads and distinct cores that the affinity mask allows.");
}

void bind_cuda(py::module_ m) {
  m.def("built", &dive::cuda::built, "Whether this build holds CUDA code.");
  m.def("built_archs", &dive::cuda::built_archs, "Architectures it was compiled for, such as '90a'.");
  m.def(
      "versions",
      [] {
        const dive::cuda::Versions versions = dive::cuda::versions();
        return py::dict("status"_a = to_python(versions.status), "runtime"_a = versions.runtime,
                        "driver"_a = versions.driver);
      },
      "CUDA runtime and driver versions as 1000 * major + 10 * minor; 0 where there is none.");
  m.def(
      "devices",
      [] {
        dive::cuda::DeviceList list;
        {
          const py::gil_scoped_release release;
          list = dive::cuda::devices();
        }
        py::list devices;
        for (const auto& device : list.devices) devices.append(to_python(device));
        return py::dict("status"_a = to_python(list.status), "devices"_a = devices);
      },
      "Every CUDA device, and whether this build holds code for it.");
  m.def(
      "probe",
      [](int device) {
        dive::cuda::ProbeResult result;
        {
          const py::gil_scoped_release release;
          result = dive::cuda::probe(device);
        }
        return py::dict("status"_a = to_python(result.status), "elements"_a = result.elements);
      },
      "device"_a, "Runs a small kernel on the device and checks what it wrote.");
}

}  // namespace
}  // namespace dive::bindings

PYBIND11_MODULE(_native, m) {
  using namespace dive::bindings;
  m.doc() = "Compiled part of dive_fast.";
  m.attr("__version__") = DIVE_VERSION;
  py::module_ cpu = m.def_submodule("cpu", "What this CPU can execute, and kernels for it.");
  bind_cpu(cpu);
  bind_linear_cross_entropy(cpu);
  bind_steer(cpu);
  bind_decode(cpu.def_submodule("decode", "The parts of a decoding step; see csrc/cpu/decode.h."));
  bind_engine(m.def_submodule("engine", "Decoding: a plan, its requests, their tokens."));
  bind_cuda(m.def_submodule("cuda", "CUDA devices and this build's code for them."));
}
