"""The identity of a base model: equal for models that give the same answers.

Experts are matched to a model by its fingerprint, which covers only the adapted matrices. Answers are cached and
compared by the identity, which covers everything that determines an answer: the model, and how lm-eval converts
requests. The location of the files, their shards, the device and the batch size are not part of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.hub import cached_file

from t2.adapters.engine import Engine
from t2.adapters.identity import (
    as_json,
    describe_attention,
    describe_config,
    describe_tokenizer,
    modules_digest,
    sample_digest,
    weights_digest,
)
from t2.core.digests import digest_of, sha256_file
from t2.core.errors import StorageError
from t2.core.files import atomic_write
from t2.core.record import ModelRef
from t2.core.references import is_digest
from t2.core.settings import cache_dir

_FORMAT = 1
"""Version of the identity; raise it when the identity of a model changes."""
_ATTRIBUTE = "t2_identity"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_READING = (
    "add_bos_token",
    "backend",
    "chat_template_args",
    "convert_img_format",
    "image_height",
    "image_max_side",
    "image_string",
    "image_token_id",
    "image_width",
    "interleave",
    "max_gen_toks",
    "max_images",
    "max_length",
    "max_pixels",
    "min_pixels",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
    "truncation_side",
)
"""Attributes of lm-eval's models that control how requests become tokens and answers text."""
_COVERED = frozenset(
    {
        *_READING,
        # covered by the weights and modules
        *("autogptq", "delta", "dtype", "gguf_file", "gptqmodel", "load_in_4bit", "load_in_8bit", "pretrained"),
        *("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
        *("revision", "subfolder", "use_safetensors", "variant"),
        # covered by the configuration
        "attn_implementation",
        # covered by the tokenizer and by _READING
        *("enable_thinking", "tokenizer", "tokenizer_mode", "tokenizer_revision", "use_fast_tokenizer"),
        "max_model_len",
        # without effect on answers
        *("batch_size", "cache_dir", "device", "device_map", "local_files_only", "logits_cache", "max_batch_size"),
        *("max_cpu_memory", "max_memory_per_gpu", "offload_folder", "parallelize", "token", "tp_plan"),
        *("trust_remote_code", "data_parallel_size", "gpu_memory_utilization", "max_num_batched_tokens"),
        *("max_num_seqs", "seed", "tensor_parallel_size", "enable_prefix_caching"),
    }
)
"""Arguments of lm-eval's models that an identity covers by their effect.

Any other argument is part of the identity by value.
"""


def identity_of(lm: Any) -> str:
    """Return the identity of a model of lm-eval, hex SHA-256.

    :func:`t2.harness.base.open_base` computes it when it loads a model. For any other model it is computed here, so the
    model must have the weights of the base.
    """
    if not hasattr(lm, _ATTRIBUTE):
        identify(lm, {})
    return str(getattr(lm, _ATTRIBUTE))


def model_ref(engine: Engine, lm: Any) -> ModelRef:
    """Return the reference to a base model, as records hold it."""
    return ModelRef(**engine.base.model_dump(), identity=identity_of(lm))


def identify(lm: Any, arguments: Mapping[str, Any]) -> None:
    """Compute the identity of a newly loaded model and store it for :func:`identity_of`.

    Args:
        lm: lm-eval's model.
        arguments: the arguments that it was loaded with.
    """
    content = {
        "format": _FORMAT,
        **(_of_vllm(lm, arguments) if hasattr(lm, "checkpoint") else _of_transformers(lm, arguments)),
        "tokenizer": describe_tokenizer(lm.tokenizer),
        "reading": {name: getattr(lm, name, None) for name in _READING},
        "arguments": {name: value for name, value in arguments.items() if name not in _COVERED},
    }
    if hasattr(lm, "processor"):
        content["processor"] = describe_config(lm.processor) if hasattr(lm.processor, "to_dict") else None
    setattr(lm, _ATTRIBUTE, digest_of(as_json(content)))


def _of_transformers(lm: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    model = lm.model
    generation = getattr(model, "generation_config", None)
    return {
        "weights": _weights(model, arguments),
        "modules": modules_digest(model),
        "config": describe_config(model.config),
        "attention": describe_attention(model.config),
        "generation": describe_config(generation) if generation is not None else None,
    }


def _weights(model: torch.nn.Module, arguments: Mapping[str, Any]) -> str:
    """Return the digest of the weights; cached by files and by :func:`sample_digest`."""
    files = [] if arguments.get("delta") else _files(arguments, "*")
    if not files:
        return weights_digest(model)
    versions = [torch.__version__, transformers.__version__]
    return _cached_digest(
        [*versions, sample_digest(model), _plain_arguments(arguments)], files, lambda: weights_digest(model)
    )


def _of_vllm(lm: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a vLLM model by its files, because vLLM does not expose its weights."""
    files = [path for pattern in _WEIGHTS for path in _files(arguments, pattern)]
    return {
        "engine": "vllm",
        "weights": _cached_digest(["files"], files, lambda: digest_of([sha256_file(path) for path in files])),
        "dtype": str(lm.dtype),
        "config": describe_config(lm.config),
        "generation": _generation(arguments),
    }


def _generation(arguments: Mapping[str, Any]) -> Any:
    with contextlib.suppress(OSError):
        config = transformers.GenerationConfig.from_pretrained(
            str(arguments["pretrained"]), revision=arguments.get("revision") or "main"
        )
        return describe_config(config)
    return None


def _plain_arguments(arguments: Mapping[str, Any]) -> Any:
    return as_json({name: value for name, value in arguments.items() if not isinstance(value, torch.nn.Module)})


def _files(arguments: Mapping[str, Any], pattern: str) -> list[Path]:
    """List the files of a pattern in a model's folder; empty if it was not loaded from a folder."""
    pretrained = arguments.get("pretrained")
    if not isinstance(pretrained, str):
        return []
    folder = Path(pretrained)
    if not folder.is_dir():
        revision = str(arguments.get("revision") or "main")
        with contextlib.suppress(OSError):
            config = cached_file(pretrained, "config.json", revision=revision, local_files_only=True)
            folder = Path(config).parent if config is not None else folder
    folder = folder / str(arguments.get("subfolder") or "")
    return sorted(path for path in folder.glob(pattern) if path.is_file()) if folder.is_dir() else []


def _cached_digest(key: Any, files: list[Path], compute: Callable[[], str]) -> str:
    """Return the cached digest for unchanged files, else compute and cache it."""
    stats = [(str(path.resolve()), *_stat(path)) for path in files]
    memo = cache_dir() / "identities" / digest_of([_FORMAT, key, stats])
    with contextlib.suppress(OSError, ValueError):
        known = memo.read_text()
        if is_digest(known):
            return known
    digest = compute()
    with contextlib.suppress(StorageError):
        atomic_write(memo, digest.encode())
    return digest


def _stat(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
