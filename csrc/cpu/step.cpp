#include "cpu/step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/decode.h"
#include "cpu/step_steer.h"
#include "engine/check.h"

namespace dive::cpu {
namespace {

using engine::Layer;
using engine::Norm;
using engine::Plan;
using engine::StepRow;

// Every worker keeps the residual stream and its norms for itself and computes them in full: a few thousand numbers,
// which cost less than a barrier between writing and reading them would.
struct Private {
  AlignedFloats stream, normed, update, inputs;
};

// What all workers see.
struct Shared {
  AlignedFloats q, k, v, attended, inner, update, logits;
  AlignedFloats cosine, sine;    // [ropes][B][E]
  std::vector<CacheRow> caches;  // [layers][B]
};

class CpuStepper final : public engine::Stepper {
 public:
  CpuStepper(const Plan& plan, int max_rows, int threads, Isa isa)
      : plan_(plan), max_rows_(max_rows), threads_(threads), isa_(isa), private_(threads),
        steer_(plan, max_rows, threads) {
    const std::int64_t B = max_rows, D = plan.hidden_size, E = plan.head_size;
    const std::int64_t widest = std::max({D, plan.heads * E, plan.intermediate_size});
    for (Private& own : private_) {
      own.inputs.resize(inputs_size(isa, max_rows, widest));
      own.stream.resize(B * D);
      own.normed.resize(B * D);
      own.update.resize(B * D);
    }
    shared_.q.resize(B * plan.heads * E);
    shared_.attended.resize(B * plan.heads * E);
    shared_.k.resize(B * plan.kv_heads * E);
    shared_.v.resize(B * plan.kv_heads * E);
    shared_.inner.resize(B * plan.intermediate_size);
    shared_.update.resize(B * D);
    shared_.logits.resize(B * plan.vocabulary);
    shared_.cosine.resize(plan.ropes.size() * B * E);
    shared_.sine.resize(plan.ropes.size() * B * E);
    shared_.caches.resize(plan.layers.size() * B);
    shape_ = {plan.heads,       plan.kv_heads,        plan.head_size,
              plan.cache_dtype, plan.attention_scale, plan.attention_softcap};
  }

  void step(const std::vector<StepRow>& rows,
            const std::function<void(std::size_t, float*, std::int64_t)>& with_logits) override {
    if (rows.empty() || rows.size() > static_cast<std::size_t>(max_rows_))
      throw std::logic_error("step: bad row count");
    prepare(rows);
    run_team(threads_, isa_, [&](const Worker& member) {
      Worker worker = member;
      worker.inputs = &private_[worker.index].inputs;
      run(worker, rows);
      for (std::size_t b = worker.index; b < rows.size(); b += worker.count) {
        float* logits = shared_.logits.data() + b * plan_.vocabulary;
        std::int64_t likeliest;
        argmax({0, 1, isa_, nullptr}, logits, 1, plan_.vocabulary, &likeliest);
        with_logits(b, logits, likeliest);
      }
    });
  }

 private:
  void prepare(const std::vector<StepRow>& rows) {
    const std::size_t B = rows.size(), E = plan_.head_size;
    tokens_.resize(B);
    for (std::size_t b = 0; b < B; ++b) tokens_[b] = rows[b].token;
    for (std::size_t r = 0; r < plan_.ropes.size(); ++r) {
      const engine::Rope& rope = plan_.ropes[r];
      for (std::size_t b = 0; b < B; ++b) {
        float* cosine = shared_.cosine.data() + (r * B + b) * E;
        float* sine = shared_.sine.data() + (r * B + b) * E;
        for (std::size_t i = 0; i < E / 2; ++i) {
          // The angle is rounded to float32 as in the models' own code, which matters far from the start.
          const float angle = static_cast<float>(rows[b].rope_position) * rope.inverse_frequency[i];
          cosine[i] = cosine[i + E / 2] = std::cos(angle) * rope.scaling;
          sine[i] = sine[i + E / 2] = std::sin(angle) * rope.scaling;
        }
      }
    }
    for (std::size_t l = 0; l < plan_.layers.size(); ++l) {
      const std::int64_t window = plan_.layers[l].window;
      for (std::size_t b = 0; b < B; ++b) {
        const std::int64_t length = rows[b].position + 1;
        shared_.caches[l * B + b] = {rows[b].cache->blocks(), rows[b].cache->keys(l), rows[b].cache->values(l),
                                     window > 0 && length > window ? length - window : 0, length};
      }
    }
    steer_.group(rows);
  }

  void run(const Worker& worker, const std::vector<StepRow>& rows) {
    const int B = static_cast<int>(rows.size());
    const Worker alone{0, 1, worker.isa, nullptr};
    Private& own = private_[worker.index];
    embed(alone, plan_.embedding, tokens_.data(), B, plan_.embedding_scale, own.stream.data());
    for (std::size_t l = 0; l < plan_.layers.size(); ++l) {
      const Layer& layer = plan_.layers[l];
      attend(worker, alone, layer, l, B, own);
      add_update(alone, layer.post_attention, B, own);
      steer_.apply(worker, l, SteerPlace::kAttention, own.stream.data(), mlp_read(worker, l));
      feed_forward(worker, alone, layer, l, B, own);
      add_update(alone, layer.post_mlp, B, own);
      steer_.apply(worker, l, SteerPlace::kBlock, own.stream.data(), layer_read(worker, l + 1));
    }
    norm(alone, plan_.final_norm, B, own);
    const Weight* head = &plan_.head;
    float* logits = shared_.logits.data();
    project(worker, &head, 1, own.normed.data(), B, &logits);
    worker.sync();
    if (plan_.logit_softcap > 0) {
      softcap(worker, logits, B * plan_.vocabulary, plan_.logit_softcap);
      worker.sync();
    }
  }

  // shared.update becomes the attention's contribution to the stream.
  void attend(const Worker& worker, const Worker& alone, const Layer& layer, std::size_t l, int B, Private& own) {
    const int E = plan_.head_size, H = plan_.heads, G = plan_.kv_heads;
    norm(alone, layer.input, B, own);
    const Weight* inputs[] = {&layer.q_proj, &layer.k_proj, &layer.v_proj};
    float* outputs[] = {shared_.q.data(), shared_.k.data(), shared_.v.data()};
    const Weight* const o = &layer.o_proj;
    project(worker, inputs, 3, own.normed.data(), B, outputs, false, first_read(worker, &o, 1));
    worker.sync();
    const CacheRow* caches = shared_.caches.data() + l * B;
    // Heads are dealt out alike in all five, so that one barrier serves them; whole rows of a batch that divides
    // evenly.
    float *const q = shared_.q.data(), *const k = shared_.k.data();
    const float* cosine = shared_.cosine.data() + std::int64_t{layer.rope} * B * E;
    const float* sine = shared_.sine.data() + std::int64_t{layer.rope} * B * E;
    if (layer.q.weight) rms_norm(worker, q, layer.q.weight, layer.q.eps, std::int64_t{B} * H, E, q);
    if (layer.k.weight) rms_norm(worker, k, layer.k.weight, layer.k.eps, std::int64_t{B} * G, E, k);
    rope(worker, q, cosine, sine, B, H, E);
    rope(worker, k, cosine, sine, B, G, E);
    append_to_cache(worker, shape_, k, shared_.v.data(), caches, B);
    worker.sync();
    attention(worker, shape_, shared_.q.data(), caches, B, shared_.attended.data());
    worker.sync();
    float* update = shared_.update.data();
    const void* next = steer_.first_read(worker, l, SteerPlace::kAttention, mlp_read(worker, l));
    project(worker, &o, 1, shared_.attended.data(), B, &update, false, next);
    worker.sync();
  }

  void feed_forward(const Worker& worker, const Worker& alone, const Layer& layer, std::size_t l, int B, Private& own) {
    norm(alone, layer.mlp, B, own);
    const Weight* const down = &layer.down_proj;
    project_gated(worker, plan_.activation, layer.gate_proj, layer.up_proj, own.normed.data(), B, shared_.inner.data(),
                  first_read(worker, &down, 1));
    worker.sync();
    float* update = shared_.update.data();
    const void* next = steer_.first_read(worker, l, SteerPlace::kBlock, layer_read(worker, l + 1));
    project(worker, &down, 1, shared_.inner.data(), B, &update, false, next);
    worker.sync();
  }

  // Where the worker begins to read in layer l, or in the head behind the last one.
  const void* layer_read(const Worker& worker, std::size_t l) const {
    if (l == plan_.layers.size()) {
      const Weight* const head = &plan_.head;
      return first_read(worker, &head, 1);
    }
    const Layer& layer = plan_.layers[l];
    const Weight* const inputs[] = {&layer.q_proj, &layer.k_proj, &layer.v_proj};
    return first_read(worker, inputs, 3);
  }

  const void* mlp_read(const Worker& worker, std::size_t l) const {
    const Weight* const gate = &plan_.layers[l].gate_proj;
    return first_read(worker, &gate, 1);
  }

  void norm(const Worker& alone, const Norm& norm, int B, Private& own) {
    rms_norm(alone, own.stream.data(), norm.weight, norm.eps, B, plan_.hidden_size, own.normed.data());
  }

  void add_update(const Worker& alone, const Norm& post, int B, Private& own) {
    const float* update = shared_.update.data();
    if (post.weight) {
      rms_norm(alone, update, post.weight, post.eps, B, plan_.hidden_size, own.update.data());
      update = own.update.data();
    }
    add(alone, own.stream.data(), update, B * plan_.hidden_size, own.stream.data());
  }

  const Plan& plan_;
  const int max_rows_, threads_;
  const Isa isa_;
  AttentionShape shape_;
  Shared shared_;
  std::vector<Private> private_;
  std::vector<std::int64_t> tokens_;
  StepSteering steer_;
};

}  // namespace

std::unique_ptr<engine::Stepper> make_stepper(const Plan& plan, int max_rows, int threads, Isa isa) {
  engine::check_team(max_rows, threads, isa);
  return std::make_unique<CpuStepper>(plan, max_rows, threads, isa);
}

}  // namespace dive::cpu
