// One decoding step on a CUDA device, behind the interface of the CPU's.
#pragma once

#include <memory>
#include <string>

#include "engine/plan.h"
#include "engine/stepper.h"

namespace dive::cuda {

// Why this build cannot run the plan on a device, empty where it can: matrices of one dtype, without int8, their sizes
// and strides multiples of 8, heads of at most 256.
std::string refusal(const engine::Plan& plan);

// What a step makes use of. kBest: the loop in one start of a graph that repeats itself, where the driver has such a
// thing (CUDA 12.4), and clusters of blocks, where the device has them (9.0). kPlain: neither, a start for every step;
// for tests.
enum class StepForm { kBest, kPlain };

// Steps of at most `max_rows` rows of the plan, whose pointers are all the device's; the plan must outlive the stepper.
// Throws std::invalid_argument with refusal(plan), std::runtime_error with what CUDA says.
std::unique_ptr<engine::Stepper> make_stepper(const engine::Plan& plan, int max_rows, int device,
                                              StepForm form = StepForm::kBest);

}  // namespace dive::cuda
