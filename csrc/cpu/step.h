// One decoding step on the CPU.
#pragma once

#include <memory>

#include "cpu/isa.h"
#include "engine/plan.h"
#include "engine/stepper.h"

namespace dive::cpu {

// Steps of at most `max_rows` rows of the plan, which must outlive the stepper.
std::unique_ptr<engine::Stepper> make_stepper(const engine::Plan& plan, int max_rows, int threads, Isa isa);

}  // namespace dive::cpu
