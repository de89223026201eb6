"""Train a small expert for a few steps on questions of one's own, and compare it with the base model."""

import tempfile
from pathlib import Path

import datasets
from lm_eval.api.task import ConfigurableTask

from t2.api import load_model, make_config, train

ANIMALS = "dog cat horse cow sheep goat wolf bear fox lion tiger mouse rabbit deer pig camel".split()
OBJECTS = (
    "chair spoon lamp book clock shoe table bottle hammer window basket pencil mirror carpet ladder kettle".split()
)


def questions(**_: object) -> dict[str, datasets.Dataset]:
    """Which of two words is the animal?"""
    rows = []
    for i, (animal, thing) in enumerate(zip(ANIMALS, OBJECTS, strict=True)):
        choices = [animal, thing] if i % 2 else [thing, animal]
        rows.append({"question": f"{choices[0]} or {choices[1]}", "choices": choices, "label": choices.index(animal)})
    return {"train": datasets.Dataset.from_list(rows[:12]), "test": datasets.Dataset.from_list(rows[12:])}


task = ConfigurableTask(
    config={
        "task": "animals",
        "custom_dataset": questions,
        "training_split": "train",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Of the two words {{question}} the one that names an animal is the",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
)

model = load_model(dtype="bfloat16")
config = make_config(
    task="animals", name="animals", steps=3, batch=8, learning_rate=0.02, clip=1.0, validate_every=1, select="reward",
    targets="mlp", layers="20-29",
)  # fmt: skip
folder = Path(tempfile.mkdtemp(prefix="t2-example-"))
result = train(config, folder=folder, lm=model.lm, task=task, progress=False)
rewards = [f"{point.reward:+.3f}" for point in result.curve if point.split == "validation"]
print("validation reward, step by step:", ", ".join(rewards))
print(f"accuracy on the validation half: {result.base_score:.2f} → {result.best_score:.2f}")
print("expert:", result.path)
print("α:", model.adapt(experts=result.path).alpha())
