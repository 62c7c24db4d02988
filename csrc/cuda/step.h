// One decoding step on a CUDA device, behind the interface of the CPU's.
#pragma once

#include <memory>
#include <string>

#include "engine/plan.h"
#include "engine/stepper.h"

namespace dive::cuda {

// Why this build cannot run the plan on a device, empty where it can: matrices of one dtype, without int8, their sizes and
// strides multiples of 8, heads of at most 256.
std::string refusal(const engine::Plan& plan);

// How the device's own loop runs: in one start of a graph that repeats itself, where the driver has such a thing (CUDA
// 12.4), or in a start for every step. The second is for tests.
enum class LoopForm { kBest, kStepByStep };

// Steps of at most `max_rows` rows of the plan, whose pointers are all the device's; the plan must outlive the stepper.
// Throws std::invalid_argument with refusal(plan), std::runtime_error with what CUDA says.
std::unique_ptr<engine::Stepper> make_stepper(const engine::Plan& plan, int max_rows, int device,
                                              LoopForm form = LoopForm::kBest);

}  // namespace dive::cuda
