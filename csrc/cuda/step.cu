#include "cuda/step.h"

#include <algorithm>
#include <compare>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/adapters.h"
#include "cuda/cache_memory.h"
#include "cuda/kernels.h"
#include "cuda/loop.h"
#include "cuda/memory.h"
#include "engine/check.h"

namespace dive::cuda {
namespace {

using engine::Layer;
using engine::Norm;
using engine::Plan;
using engine::StepRow;
static_assert(kMostRows == engine::kMostRows);

Matrix matrix_of(const engine::Weight& w) {
  return {w.data, w.bias, w.row_stride, static_cast<std::int32_t>(w.rows), static_cast<std::int32_t>(w.columns)};
}

NormWeight norm_of(const Norm& norm) { return {norm.weight, norm.eps}; }

// Steps are recorded for these numbers of rows; those between take the next, with rows that stand for nothing. A tile
// of products has 8 rows in any case.
constexpr int kBatches[] = {1, 2, 4, 8, 16, 24, 32, 48, 64};

int batch_for(std::size_t rows) {
  return *std::lower_bound(std::begin(kBatches), std::end(kBatches), static_cast<int>(rows));
}

// What a recorded step depends on.
struct Form {
  int batch, turns;  // rows, and adapters in turn
  int tile;          // rows that have an adapter together, see arrive()

  auto operator<=>(const Form&) const = default;
};

class CudaStepper final : public engine::Stepper {
 public:
  CudaStepper(const Plan& plan, int max_rows, int device, StepForm form)
      : plan_(plan), max_rows_(batch_for(max_rows)), device_(device), dtype_(plan.cache_dtype),
        memory_(device, stream_), loop_(max_rows_, plan.vocabulary), adapters_(plan, max_rows_),
        repeats_(form == StepForm::kBest && Graph::can_repeat()) {
    const std::size_t D = plan.hidden_size, queries = std::size_t(plan.heads) * plan.head_size;
    const std::size_t keys = std::size_t(plan.kv_heads) * plan.head_size, half = plan.head_size / 2;
    const char* const what = "a step's activations";
    const auto floats = [&](std::size_t count) { return DeviceArray<float>(count, what); };
    const auto activations = [&](std::size_t columns) {
      return DeviceArray<std::byte>(max_rows_ * columns * cpu::size_of(dtype_), what);
    };
    rows_ = DeviceArray<Row>(max_rows_, what);
    staged_rows_ = PinnedArray<Row>(max_rows_);
    residual_ = floats(max_rows_ * D);
    update_ = floats(max_rows_ * D);
    q_ = floats(max_rows_ * queries);
    k_ = floats(max_rows_ * keys);
    v_ = floats(max_rows_ * keys);
    normed_ = activations(D);
    attended_ = activations(queries);
    inner_ = activations(plan.intermediate_size);
    pieces_ = floats(max_rows_ * plan.heads * std::size_t(kMostPieces) * (plan.head_size + 4));
    tickets_ = zeroed_tickets(std::size_t(max_rows_) * (plan.heads + 2) + 1);
    logits_ = DeviceArray<float>(max_rows_ * std::size_t(plan.vocabulary), "logits");
    bests_ = DeviceArray<Best>(max_rows_ * std::size_t{kMostVocabularyPieces}, "logits");
    likeliest_ = DeviceArray<std::int64_t>(max_rows_, what);
    cosine_ = floats(plan.ropes.size() * max_rows_ * half);
    sine_ = floats(plan.ropes.size() * max_rows_ * half);
    upload_ropes();
    if (form == StepForm::kBest) {
      check(blocks_of_arrivals(dtype_, hidden_size(), adapters_.most_rank(), device, &cluster_),
            "asking for clusters of blocks");
    }
    make_tables(16);
  }

  engine::CacheMemory& memory() override { return memory_; }

  void step(const std::vector<StepRow>& rows,
            const std::function<void(std::size_t, float*, std::int64_t)>& with_logits) override {
    check_count(rows.size());
    const CurrentDevice current(device_);
    const Form form = stage(rows, 1);
    auto& graph = steps_[form];
    if (!graph) graph = std::make_unique<Graph>(stream_, [&] { enqueue(form); });
    graph->launch(stream_);
    const std::size_t count = rows.size() * plan_.vocabulary;
    if (host_logits_.size() < count) host_logits_ = PinnedArray<float>(count);
    if (host_likeliest_.size() < rows.size()) host_likeliest_ = PinnedArray<std::int64_t>(max_rows_);
    copy(host_logits_.data(), logits_.data(), count * sizeof(float));
    copy(host_likeliest_.data(), likeliest_.data(), rows.size() * sizeof(std::int64_t));
    stream_.wait();
    for (std::size_t b = 0; b < rows.size(); ++b) {
      with_logits(b, host_logits_.data() + b * plan_.vocabulary, host_likeliest_[b]);
    }
  }

  int most_loop_steps() const override { return Loop::kMostSteps; }
  const char* loop_form() const override { return repeats_ ? "on the device" : "on the device, step by step"; }

  void loop(const std::vector<engine::LoopRow>& rows, int steps,
            const std::function<void(const engine::Choice*)>& taken, const std::function<bool()>& wants_stop) override {
    check_count(rows.size());
    const CurrentDevice current(device_);
    std::vector<StepRow> first;
    for (const engine::LoopRow& row : rows) first.push_back(row.row);
    const Form form = stage(first, steps);
    if (loop_.make_room(rows)) loops_.clear();
    loop_.start(stream_, rows, form.batch, steps);
    auto& graph = loops_[form];
    if (!graph) graph = recorded_loop(form);
    loop_.run(stream_, *graph, repeats_, static_cast<int>(rows.size()), taken, wants_stop);
  }

 private:
  void check_count(std::size_t rows) const {
    if (rows == 0 || rows > static_cast<std::size_t>(max_rows_)) throw std::logic_error("step: bad row count");
  }

  // A step with what follows it, in a node that repeats it where the driver has such a thing.
  std::unique_ptr<Graph> recorded_loop(const Form& form) {
    Advance arguments = loop_.arguments(rows_.data(), logits_.data(), likeliest_.data(),
                                        tickets_.data() + std::size_t(max_rows_) * (plan_.heads + 2));
    const auto record = [&] {
      enqueue(form);
      check(advance(stream_, arguments, form.batch), "choosing tokens");
    };
#if CUDART_VERSION >= 12040
    if (repeats_) {
      try {
        return Graph::repeating(stream_, [&](cudaGraphConditionalHandle condition) {
          arguments.condition = condition;
          arguments.has_condition = true;
          record();
        });
      } catch (const OutOfMemory&) {
        throw;
      } catch (const std::runtime_error&) {
        // A driver that has such nodes and does not take these kernels in them; loop_form() says so.
        repeats_ = false;
        arguments.has_condition = false;
      }
    }
#endif
    return std::make_unique<Graph>(stream_, record);
  }

  void copy(void* to, const void* from, std::size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "copying a step's rows");
  }

  static DeviceArray<unsigned> zeroed_tickets(std::size_t count) {
    DeviceArray<unsigned> tickets(count, "a step's tickets");
    check(cudaMemset(tickets.data(), 0, count * sizeof(unsigned)), "a step's tickets");
    return tickets;
  }

  void upload_ropes() {
    std::vector<float> frequencies, scaling;
    for (const engine::Rope& rope : plan_.ropes) {
      frequencies.insert(frequencies.end(), rope.inverse_frequency.begin(), rope.inverse_frequency.end());
      scaling.push_back(rope.scaling);
    }
    frequencies_ = uploaded(frequencies, "rope frequencies");
    scaling_ = uploaded(scaling, "rope frequencies");
  }

  void make_tables(std::size_t blocks) {
    forget_graphs();
    // All three or none: who runs out of memory may try again.
    DeviceArray<std::byte*> own(max_rows_ * blocks, "block tables");
    PinnedArray<std::byte*> staged(max_rows_ * blocks);
    std::vector<std::byte* const*> tables;
    for (int b = 0; b < max_rows_; ++b) tables.push_back(own.data() + b * blocks);
    tables_ = uploaded(tables, "block tables");
    blocks_ = std::move(own);
    staged_blocks_ = std::move(staged);
  }

  void forget_graphs() {
    steps_.clear();
    loops_.clear();
  }

  // Puts what so many steps are to run where the device finds it, idle rows behind it.
  Form stage(const std::vector<StepRow>& rows, int steps) {
    const auto blocks_of = [&](const StepRow& row) {
      return static_cast<std::size_t>((row.position + steps - 1) / cpu::kCacheBlock + 1);
    };
    std::size_t turns = 0, blocks = 0;
    for (const StepRow& row : rows) {
      turns = std::max(turns, row.adapters->size());
      blocks = std::max(blocks, blocks_of(row));
    }
    if (adapters_.make_room(turns)) forget_graphs();
    const std::size_t capacity = blocks_.size() / max_rows_;
    if (blocks > capacity) make_tables(std::max(blocks, 2 * capacity));
    const std::size_t width = blocks_.size() / max_rows_, batch = batch_for(rows.size());
    for (std::size_t b = 0; b < batch; ++b) {
      std::byte** const table = staged_blocks_.data() + b * width;
      if (b >= rows.size()) {
        staged_rows_[b] = {0, 0, 0};
        table[0] = nullptr;
        continue;
      }
      const StepRow& row = rows[b];
      staged_rows_[b] = {row.token, static_cast<std::int32_t>(row.position),
                         static_cast<std::int32_t>(row.rope_position)};
      std::copy_n(row.cache->blocks(), blocks_of(row), table);
    }
    copy(rows_.data(), staged_rows_.data(), batch * sizeof(Row));
    copy(blocks_.data(), staged_blocks_.data(), batch * width * sizeof(std::byte*));
    return {static_cast<int>(batch), static_cast<int>(turns), adapters_.stage(stream_, rows, batch, turns)};
  }

  void enqueue(const Form& form) {
    const int batch = form.batch;
    const Begin start{rows_.data(),
                      plan_.embedding.data,
                      plan_.embedding.row_stride,
                      plan_.embedding_scale,
                      hidden_size(),
                      residual_.data(),
                      frequencies_.data(),
                      scaling_.data(),
                      static_cast<int>(plan_.ropes.size()),
                      plan_.head_size / 2,
                      cosine_.data(),
                      sine_.data(),
                      max_rows_};
    check(begin(stream_, dtype_, start, batch), "embedding tokens");
    add(arrival({}, nullptr, plan_.layers[0].input), form);
    for (std::size_t l = 0; l < plan_.layers.size(); ++l) {
      const Layer& layer = plan_.layers[l];
      attend(layer, l, batch);
      arrive(l, kAttention, layer.post_attention, layer.mlp, form);
      check(project_gated(stream_, dtype_, plan_.activation, matrix_of(layer.gate_proj), matrix_of(layer.up_proj),
                          normed_.data(), batch, inner_.data()),
            "the MLP's first product");
      multiply({&layer.down_proj}, inner_.data(), batch, {update_.data()}, "the MLP's second product");
      const bool last = l + 1 == plan_.layers.size();
      arrive(l, kBlock, layer.post_mlp, last ? plan_.final_norm : plan_.layers[l + 1].input, form);
    }
    multiply({&plan_.head}, normed_.data(), batch, {logits_.data()}, "the head");
    const Finish end{logits_.data(),
                     plan_.vocabulary,
                     plan_.logit_softcap,
                     bests_.data(),
                     tickets_.data() + std::size_t(max_rows_) * (plan_.heads + 1),
                     likeliest_.data()};
    check(finish(stream_, end, batch), "the logits");
  }

  int hidden_size() const { return static_cast<int>(plan_.hidden_size); }

  void multiply(const std::vector<const engine::Weight*>& weights, const void* x, int batch,
                const std::vector<float*>& outputs, const char* doing) {
    std::vector<Matrix> matrices;
    for (const engine::Weight* weight : weights) matrices.push_back(matrix_of(*weight));
    check(project(stream_, dtype_, matrices.data(), static_cast<int>(matrices.size()), x, batch, outputs.data()),
          doing);
  }

  void attend(const Layer& layer, std::size_t l, int batch) {
    multiply({&layer.q_proj, &layer.k_proj, &layer.v_proj}, normed_.data(), batch, {q_.data(), k_.data(), v_.data()},
             "queries, keys and values");
    const std::size_t angles = std::size_t(layer.rope) * max_rows_ * (plan_.head_size / 2);
    const std::int64_t slab = std::int64_t{plan_.kv_heads} * cpu::kCacheBlock * plan_.head_size * cpu::size_of(dtype_);
    const Attention attention{rows_.data(),
                              q_.data(),
                              k_.data(),
                              v_.data(),
                              norm_of(layer.q),
                              norm_of(layer.k),
                              cosine_.data() + angles,
                              sine_.data() + angles,
                              tables_.data(),
                              static_cast<std::int64_t>(2 * l) * slab,
                              static_cast<std::int64_t>(2 * l + 1) * slab,
                              plan_.heads,
                              plan_.kv_heads,
                              plan_.head_size,
                              static_cast<int>(std::min<std::int64_t>(layer.window, INT32_MAX)),
                              plan_.attention_scale,
                              plan_.attention_softcap,
                              pieces_.data(),
                              tickets_.data(),
                              attended_.data()};
    check(cuda::attention(stream_, dtype_, attention, batch), "attention");
    multiply({&layer.o_proj}, attended_.data(), batch, {update_.data()}, "the attention's output");
  }

  // The update reaches the residual stream, is steered there, and the next norm follows.
  void arrive(std::size_t l, Place place, const Norm& post, const Norm& next, const Form& form) {
    if (form.turns == 0 || !adapters_.act(l, place)) return add(arrival(post, update_.data(), next), form);
    for (int turn = 0; turn < form.turns; ++turn) {
      const bool first = turn == 0, last = turn + 1 == form.turns;
      Steer arguments = arrival(post, first ? update_.data() : nullptr, last ? next : Norm{});
      adapters_.steer(arguments, l, place, turn);
      if (cluster_) {
        add(arguments, form);
      } else {
        check(steer(stream_, dtype_, arguments, form.batch), "steering");
      }
    }
  }

  void add(const Steer& a, const Form& form) {
    if (cluster_) {
      // Rows that nothing steers have nothing to share, and more of them run side by side.
      const int tile = a.steerings ? form.tile : 1;
      check(cuda::arrive(stream_, dtype_, a, form.batch, cluster_, tile), "the residual stream");
    } else {
      check(add_norm(stream_, dtype_, {a.residual, a.update, a.post, a.norm, a.normed, a.hidden_size}, form.batch),
            "a norm");
    }
  }

  // One that nothing steers: without the shared memory that adapters want, too.
  Steer arrival(const Norm& post, const float* update, const Norm& next) const {
    return {.residual = residual_.data(),
            .update = update,
            .post = norm_of(post),
            .norm = norm_of(next),
            .normed = normed_.data(),
            .hidden_size = hidden_size(),
            .most_rank = 0,
            .half = false,
            .steerings = nullptr,
            .steerings_stride = 0,
            .adapters = nullptr,
            .hidden = nullptr,
            .activated = nullptr,
            .gates = nullptr,
            .tickets = tickets_.data() + std::size_t(max_rows_) * plan_.heads};
  }

  const Plan& plan_;
  const int max_rows_, device_;
  const DType dtype_;
  OwnStream stream_;
  DeviceMemory memory_;
  Loop loop_;
  Adapters adapters_;
  bool repeats_;
  DeviceArray<Row> rows_;
  PinnedArray<Row> staged_rows_;
  DeviceArray<float> residual_, update_, q_, k_, v_, pieces_, logits_, cosine_, sine_, frequencies_, scaling_;
  DeviceArray<std::byte> normed_, attended_, inner_;
  DeviceArray<unsigned> tickets_;  // [B][H] of attention, [B] of steering, [B] of the logits, one of the loop
  DeviceArray<Best> bests_;
  DeviceArray<std::int64_t> likeliest_;
  PinnedArray<float> host_logits_;
  PinnedArray<std::int64_t> host_likeliest_;
  DeviceArray<std::byte*> blocks_;  // [B][blocks of the longest row]
  PinnedArray<std::byte*> staged_blocks_;
  DeviceArray<std::byte* const*> tables_;  // [B], into blocks_
  int cluster_ = 0;                        // blocks of a cluster, 0 where there are none
  std::map<Form, std::unique_ptr<Graph>> steps_, loops_;
};

bool multiple_of_eight(std::int64_t x) { return x % 8 == 0; }

// Why a matrix cannot be read 16 bytes at a time.
std::string refusal(const std::string& part, const engine::Weight& w, DType dtype) {
  if (w.scales) return part + " is int8";
  if (w.dtype != dtype) return part + " has another dtype than the others";
  const bool aligned = reinterpret_cast<std::uintptr_t>(w.data) % 16 == 0;
  if (!aligned || !multiple_of_eight(w.columns) || !multiple_of_eight(w.row_stride)) {
    return part + " has rows that do not begin at multiples of 16 bytes";
  }
  return {};
}

}  // namespace

std::string refusal(const Plan& plan) {
  if (plan.head_size > 256 || !multiple_of_eight(plan.head_size)) {
    return "heads of " + std::to_string(plan.head_size) + ", expected a multiple of 8 up to 256";
  }
  std::vector<std::pair<std::string, const engine::Weight*>> matrices{{"the embedding", &plan.embedding},
                                                                      {"the head", &plan.head}};
  for (std::size_t l = 0; l < plan.layers.size(); ++l) {
    const Layer& layer = plan.layers[l];
    const std::pair<const char*, const engine::Weight*> own[] = {
        {"q_proj", &layer.q_proj},      {"k_proj", &layer.k_proj},       {"v_proj", &layer.v_proj},
        {"o_proj", &layer.o_proj},      {"gate_proj", &layer.gate_proj}, {"up_proj", &layer.up_proj},
        {"down_proj", &layer.down_proj}};
    for (const auto& [name, weight] : own) matrices.emplace_back("layer " + std::to_string(l) + ": " + name, weight);
  }
  for (const auto& [part, weight] : matrices) {
    if (std::string reason = refusal(part, *weight, plan.cache_dtype); !reason.empty()) return reason;
  }
  for (const engine::Adapter& adapter : plan.adapters) {
    for (const auto* places : {&adapter.attention, &adapter.block}) {
      for (const auto& site : *places) {
        if (site && reinterpret_cast<std::uintptr_t>(site->matrices.data) % 16 != 0) return "an adapter is not aligned";
      }
    }
  }
  return {};
}

std::unique_ptr<engine::Stepper> make_stepper(const Plan& plan, int max_rows, int device, StepForm form) {
  if (max_rows < 1 || max_rows > kMostRows) throw std::invalid_argument("max_rows: expected 1 to 64");
  if (const std::string reason = refusal(plan); !reason.empty()) throw std::invalid_argument("plan: " + reason);
  const CurrentDevice current(device);
  wait_for_others("waiting for a model's tensors");
  return std::make_unique<CudaStepper>(plan, max_rows, device, form);
}

}  // namespace dive::cuda
