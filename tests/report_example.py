"""A result with invented reports and made-up numbers, for the report and command-line tests."""

import math

REFERENCES = (
    "The heart is normal in size. The lungs are clear. There is no pneumothorax or pleural effusion.",
    "Mild cardiomegaly. Small left pleural effusion with possible basilar atelectasis. No pneumothorax.",
    "Right upper lobe opacity which may represent pneumonia. No effusion is seen.",
)


def system(name: str, label: str, role: str, perplexity: float, **more) -> dict:
    """One system of a result; the scores follow from the perplexity so that they agree with one another."""
    skill = 1 / math.log(perplexity)
    scores = {"bleu_1": 0.8 * skill, "bleu_4": 0.25 * skill, "rouge_l": 0.7 * skill, "cider": 0.9 * skill,
              "decisive_f1": min(0.95, 1.1 * skill), "length_error": 0.2 / skill}  # fmt: skip
    intervals = {key: [value * 0.9, value * 1.1] for key, value in scores.items()}
    perplexity_interval = [perplexity * 0.93, perplexity * 1.07]
    measured = {"perplexity": perplexity, "perplexity_interval": perplexity_interval,
                "scores": scores, "intervals": intervals}  # fmt: skip
    predictions = [
        REFERENCES[0],
        "The heart is enlarged. No pleural effusion. Possible atelectasis. No pneumothorax.",
        "The lungs are clear. No effusion." if role != "adapter" else REFERENCES[2],
    ]
    samples = [
        {"id": f"case-{i}", "prompt": "Tags: normal. Indication: chest pain for two days.\nWrite the findings.",
         "reference": reference, "prediction": prediction}
        for i, (reference, prediction) in enumerate(zip(REFERENCES, predictions, strict=True), 1)
    ]  # fmt: skip
    return {
        "name": name, "label": label, "role": role, "trainable_parameters": 0, "train_seconds": None,
        "generate_seconds": 41.5, "engine": "native", "history": [], **measured,
        "finish": {"eos": min(1.0, 1.6 * skill), "length": 0.0},
        "unseen": {"n": 36, **measured}, "samples": samples,
        "lengths": [round(22 + 14 * math.sin(i * perplexity)) + i % 9 for i in range(64)], **more,
    }  # fmt: skip


def history(last: float, steps: int = 60) -> list[dict]:
    """A falling, jittery training loss with an evaluation every 20 steps."""
    fall = [last + 2.2 * math.exp(-step / 14) + 0.12 * math.sin(step * 7.7) for step in range(1, steps + 1)]
    entries = [{"step": step, "loss": loss} for step, loss in enumerate(fall, 1)]
    return entries + [{"step": step, "eval_loss": fall[step - 1] + 0.15} for step in range(20, steps + 1, 20)]


def example_result() -> dict:
    """Zero-shot, a teacher and three adapters, complete in every key of the schema."""
    return {
        "title": "Steering SmolLM2-135M to write chest reports",
        "created": "2026-01-15 10:30",
        "command": "dive-fast demo --steps 60 --eval-reports 64 --seed 1",
        "protocol": "r2gen",
        "run": {"seed": 1, "steps": 60, "batch_size": 8, "learning_rate": 0.003, "seconds_total": 905.2},
        "data": {"name": "Invented chest reports", "licence": "CC0 1.0", "train": 2069, "eval": 64, "unseen": 36},
        "environment": {"device": "CPU, 2 cores", "torch": "2.13.0", "python": "3.11.7"},
        "reference_lengths": [28 + round(9 * math.sin(i)) for i in range(64)],
        "systems": [
            system("zero-shot", "Zero-shot", "baseline", 47.1, description="the frozen model, no demonstrations"),
            system("teacher", "4-shot teacher", "teacher", 18.0, description="four demonstrations in every prompt"),
            system("fixed", "Fixed vectors", "adapter", 28.5, trainable_parameters=17_310, train_seconds=140.0,
                   history=history(3.3), description="open loop: one vector a layer"),
            system("lora", "LoRA", "adapter", 11.2, trainable_parameters=460_800, train_seconds=231.0,
                   history=history(2.45), description="rank 4 on q and v, through PEFT"),
            system("lowrank", "DIVE low-rank", "adapter", 10.1, trainable_parameters=570_720, train_seconds=188.0,
                   history=history(2.3), description="state-conditioned, rank 16, scope response"),
        ],
    }  # fmt: skip
