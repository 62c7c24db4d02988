// What a plan and a request must be for the loop and the steps to trust them. Everything here throws
// std::invalid_argument with the part's name, what it is and what was expected. What lies behind a pointer cannot be
// seen from here: whoever takes the address answers for the memory.
#pragma once

#include <vector>

#include "cpu/isa.h"
#include "engine/plan.h"
#include "engine/session.h"

namespace dive::engine {

// Rows of one step, which is what the kernels are made for, and threads of one team.
inline constexpr int kMostRows = 64, kMostThreads = 1024;

// Sizes that fit each other, pointers that are there and aligned, numbers that are finite, indices in range.
void check(const Plan& plan);

// `plan` was checked before.
void check(const Plan& plan, const Request& request, const std::vector<PrefilledLayer>& layers);

void check(const Sampling& sampling);

void check_team(int max_rows, int threads, cpu::Isa isa);

}  // namespace dive::engine
