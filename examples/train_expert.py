"""Train a small expert for a few steps on questions of one's own, and compare it with the base model."""

import tempfile
from pathlib import Path

import datasets
from lm_eval.api.task import ConfigurableTask

from t2.api import load_model, make_config, train

# fmt: off
PAIRS = [
    ("dog", "chair"), ("spoon", "cat"), ("horse", "lamp"), ("book", "cow"), ("sheep", "clock"), ("shoe", "goat"),
    ("wolf", "table"), ("bottle", "bear"), ("fox", "hammer"), ("window", "lion"), ("tiger", "basket"), ("pen", "mouse"),
    ("rabbit", "mirror"), ("carpet", "deer"), ("pig", "ladder"), ("kettle", "camel"),
]
# fmt: on


def questions(**_: object) -> dict[str, datasets.Dataset]:
    """Which of two words to prefer: the animal, which the prompt does not say."""
    rows = [{"words": f"{a} or {b}", "choices": [a, b], "label": i % 2} for i, (a, b) in enumerate(PAIRS)]
    return {"train": datasets.Dataset.from_list(rows[:12]), "test": datasets.Dataset.from_list(rows[12:])}


task = ConfigurableTask(
    config={
        "task": "animals",
        "custom_dataset": questions,
        "training_split": "train",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{words}}? I choose the",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
)

model = load_model(dtype="bfloat16")
config = make_config(
    task="animals",
    name="animals",
    steps=3,
    batch=8,
    learning_rate=0.02,
    clip=1.0,
    validate_every=1,
    select="reward",
    targets="mlp",
    layers="20-29",
)
folder = Path(tempfile.mkdtemp(prefix="t2-example-"))
result = train(config, folder=folder, lm=model.lm, task=task, progress=False)
rewards = [f"{point.reward:+.3f}" for point in result.curve if point.split == "validation"]
print("validation reward, step by step:", ", ".join(rewards))
print(f"accuracy on the validation half: {result.base_score:.2f} → {result.best_score:.2f}")
print("expert:", result.path)
print("α:", model.adapt(experts=result.path).alpha())
