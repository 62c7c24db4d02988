// The device interface of a build without CUDA.
#include <stdexcept>

#include "cuda/device.h"
#include "cuda/step.h"

namespace dive::cuda {
namespace {

Status not_built() { return {false, "this build holds no CUDA code: no working nvcc was found when it was compiled"}; }

}  // namespace

bool built() { return false; }

std::vector<std::string> built_archs() { return {}; }

Versions versions() { return {.status = not_built()}; }

DeviceList devices() { return {.status = not_built(), .devices = {}}; }

ProbeResult probe(int) { return {.status = not_built()}; }

std::string refusal(const engine::Plan&) { return not_built().message; }

std::unique_ptr<engine::Stepper> make_stepper(const engine::Plan&, int, int, StepForm) {
  throw std::invalid_argument(not_built().message);
}

}  // namespace dive::cuda
