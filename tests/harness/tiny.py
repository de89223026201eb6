"""A tiny random llama over single characters, made-up tasks and experts for it: enough for everything but meaning."""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch
import transformers
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.targets import layer_of
from t2.core.expertfile import write_expert
from t2.core.manifest import BaseModelRef, Manifest

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per printable character."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *string.printable]
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT
    return wrapped


def save_model(folder: Path, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """A random model with weights large enough that its answers depend on its input."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def engine_of(folder: Path) -> TransformersEngine:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return TransformersEngine(model, transformers.AutoTokenizer.from_pretrained(folder), folder.name)


def save_expert(
    path: Path,
    engine: TransformersEngine,
    seed: int,
    *,
    domain: str | None = None,
    scale: float = 0.5,
    base: BaseModelRef | None = None,
    layers: Collection[int] | None = None,
    **manifest: Any,
) -> Path:
    """A random expert, z = 1 + scale·N(0, 1), of all layers or some."""
    rng = np.random.default_rng(seed)
    ranks = {name: r for name, r in engine.ranks().items() if layers is None or layer_of(name) in layers}
    z = {name: (1 + scale * rng.standard_normal(r)).astype(np.float32) for name, r in ranks.items()}
    targets = {name: len(vector) for name, vector in z.items()}
    write_expert(
        path, Manifest(name=path.stem, base=base or engine.base, targets=targets, domain=domain, **manifest), z
    )
    return path


def questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Made-up questions of four choices; ``gold`` is an index."""
    rng = np.random.default_rng(start + 1)
    rows = []
    for i in range(start, start + count):
        choices = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(4)]
        rows.append({"q": f"{i} of {rng.integers(90)}", "choices": choices, "gold": int(rng.integers(4))})
    return rows


Rows = Sequence[dict[str, Any]]


def _task(name: str, splits: Mapping[str, Rows], **config: Any) -> ConfigurableTask:
    def load(**_: Any) -> dict[str, datasets.Dataset]:
        return {split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()}

    named = {f"{split}_split": split for split in splits}
    return ConfigurableTask(
        config={"task": name, "custom_dataset": load, "metadata": {"version": 1.0}, **named, **config}
    )


def metric(name: str, higher: bool = True, aggregation: str | Callable[..., Any] = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


def splits(**changes: Rows | None) -> dict[str, Rows]:
    given: dict[str, Rows | None] = {"validation": questions(30, 100), "test": questions(12), **changes}
    return {split: rows for split, rows in given.items() if rows is not None}


def choice_task(name: str = "tiny_choice", data: Mapping[str, Rows] | None = None, **config: Any) -> ConfigurableTask:
    """A likelihood task of four choices."""
    defaults: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [metric("acc"), metric("acc_norm")],
    }
    return _task(name, data or splits(), **{**defaults, **config})


def text_task(name: str = "tiny_text", data: Mapping[str, Rows] | None = None, **config: Any) -> ConfigurableTask:
    """A generation task; an answer counts as right when it holds a vowel among its first letters."""
    defaults: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n", "z"], "max_gen_toks": 10, "do_sample": False},
        "process_results": vowel_early,
        "metric_list": [metric("vowel")],
    }
    return _task(name, data or splits(), **{**defaults, **config})


def vowel_early(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"vowel": float(any(letter in "aeiouAEIOU" for letter in results[0][:4]))}


def rolling_task(name: str = "tiny_rolling", data: Mapping[str, Rows] | None = None, **config: Any) -> ConfigurableTask:
    """A perplexity task over short texts."""
    defaults: dict[str, Any] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}} {{choices | join(' ')}} " * 3,
        "metric_list": [metric("word_perplexity", higher=False, aggregation="weighted_perplexity")],
    }
    return _task(name, data or splits(), **{**defaults, **config})


def evaluate(model: Any, tasks: Sequence[ConfigurableTask], **kwargs: Any) -> dict[str, Any]:
    """lm-eval's own evaluation, without the scan of its task folder."""
    defaults: dict[str, Any] = {"bootstrap_iters": 0, "log_samples": True}
    manager = TaskManager(include_defaults=False)
    results = evaluator.simple_evaluate(model, tasks=list(tasks), task_manager=manager, **{**defaults, **kwargs})
    assert results is not None
    return dict(results)


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """What was asked, answered and scored, sample by sample."""
    kept = ("doc_id", "doc", "arguments", "resps", "filtered_resps", "doc_hash", "metrics")
    return [[sample[key] for key in (*kept, *sample["metrics"])] for sample in results["samples"][task]]
