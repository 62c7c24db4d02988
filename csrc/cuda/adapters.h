// A plan's adapters in the device's memory, and which of them act on the rows of a step.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/memory.h"
#include "engine/plan.h"
#include "engine/stepper.h"

namespace dive::cuda {

// Where in a layer an adapter acts: behind its attention or at its end.
enum Place { kAttention, kBlock, kPlaces };

class Adapters {
 public:
  Adapters(const engine::Plan& plan, int max_rows)
      : max_rows_(max_rows), layers_(plan.layers.size()), acts_(layers_ * kPlaces, false) {
    if (plan.adapters.empty()) return;
    std::vector<Steering> steerings;
    for (const engine::Adapter& adapter : plan.adapters) {
      for (std::size_t l = 0; l < layers_; ++l) {
        for (int place = 0; place < kPlaces; ++place) {
          const auto& site = (place == kBlock ? adapter.block : adapter.attention)[l];
          steerings.push_back(site ? steering_of(*site) : absent());
          if (!site) continue;
          acts_[l * kPlaces + place] = true;
          half_ = half_ && site->matrices.dtype != DType::kFloat32;
          most_rank_ = std::max(most_rank_, static_cast<int>(site->rank));
        }
      }
    }
    steerings_ = uploaded(steerings, "adapters");
    hidden_ = DeviceArray<float>(static_cast<std::size_t>(max_rows) * plan.hidden_size, "adapters");
    activated_ = DeviceArray<float>(static_cast<std::size_t>(max_rows) * std::max(most_rank_, 1), "adapters");
    gates_ = DeviceArray<float>(max_rows, "adapters");
    make_room(1);
  }

  int most_rank() const { return most_rank_; }

  // Whether some adapter does.
  bool act(std::size_t layer, Place place) const { return acts_[layer * kPlaces + place]; }

  // Whether so many adapters in turn needed memory that was not there before, in which case recorded steps hold an
  // address that is gone.
  bool make_room(std::size_t turns) {
    if (turns * max_rows_ <= of_rows_.size()) return false;
    // Both or neither: who runs out of memory may try again.
    DeviceArray<std::int32_t> of_rows(turns * max_rows_, "adapters");
    staged_ = PinnedArray<std::int32_t>(turns * max_rows_);
    of_rows_ = std::move(of_rows);
    return true;
  }

  // Puts the rows' adapters where the device finds them; rows from there up to `batch` have none. A row's last adapter
  // acts in the last turn, whatever others have, since the norm behind it is rounded in another way when it comes with
  // a later turn. Returns the most rows that share their adapters wherever they have some, 1 or kTileOfArrivals.
  int stage(cudaStream_t stream, const std::vector<engine::StepRow>& rows, std::size_t batch, std::size_t turns) {
    int tile = batch == 1 ? 1 : kTileOfArrivals;
    for (std::size_t turn = 0; turn < turns; ++turn) {
      std::int32_t of_tile = -1;
      for (std::size_t b = 0; b < batch; ++b) {
        const std::size_t idle = turns - (b < rows.size() ? rows[b].adapters->size() : 0);
        const std::int32_t own = turn < idle ? -1 : (*rows[b].adapters)[turn - idle];
        staged_[turn * max_rows_ + b] = own;
        if (b % kTileOfArrivals == 0) of_tile = -1;
        if (own >= 0 && of_tile >= 0 && own != of_tile) tile = 1;
        if (own >= 0) of_tile = own;
      }
    }
    const std::size_t bytes = turns * max_rows_ * sizeof(std::int32_t);
    if (turns) check(cudaMemcpyAsync(of_rows_.data(), staged_.data(), bytes, cudaMemcpyDefault, stream), "adapters");
    return tile;
  }

  // Makes an arrival at that place one that is steered, by the adapters of that turn.
  void steer(Steer& arrival, std::size_t layer, Place place, std::size_t turn) const {
    arrival.most_rank = most_rank_;
    arrival.half = half_;
    arrival.steerings = steerings_.data() + layer * kPlaces + place;
    arrival.steerings_stride = static_cast<std::int64_t>(layers_ * kPlaces);
    arrival.adapters = of_rows_.data() + turn * max_rows_;
    arrival.hidden = hidden_.data();
    arrival.activated = activated_.data();
    arrival.gates = gates_.data();
  }

 private:
  static Steering absent() {
    Steering none{};
    none.rank = -1;
    return none;
  }

  static Steering steering_of(const engine::Steering& s) {
    return {.rank = static_cast<std::int32_t>(s.rank),
            .columns = static_cast<std::int32_t>(s.matrices.columns),
            .matrices = s.matrices.data,
            .dtype = s.matrices.dtype,
            .activation = s.activation,
            .bias = s.bias,
            .static_push = s.static_push,
            .gate_direction = s.gate_direction,
            .alpha = s.alpha,
            .gate_offset = s.gate_offset,
            .normalize_input = s.normalize_input,
            .preserve_norm = s.preserve_norm};
  }

  const std::size_t max_rows_, layers_;
  std::vector<bool> acts_;           // [layers][places]
  int most_rank_ = 0;                // of all adapters
  bool half_ = true;                 // of all adapters' matrices
  DeviceArray<Steering> steerings_;  // [adapters][layers][places]
  DeviceArray<float> hidden_, activated_, gates_;
  DeviceArray<std::int32_t> of_rows_;  // [turns][B]
  PinnedArray<std::int32_t> staged_;
};

}  // namespace dive::cuda
