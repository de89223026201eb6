"""Digests and descriptions of everything in a model that determines its answers.

These are weights and buffers, modules, configuration and tokenizer. The fingerprint of :mod:`t2.adapters.basis` says
whether an expert fits a model: it covers only the adapted matrices, rounded to bfloat16. The digests here say whether
two models give the same answers, so they cover every number bit for bit, in the dtype in which it was loaded.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from t2.core.digests import digest_of, sha256, sha256_file

_SAMPLED = 64
"""Elements of each tensor in :func:`sample_digest`."""
_UNRELATED_CONFIG = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version"})
"""Configuration entries without effect: other digests cover the classes and dtypes."""
_UNRELATED_STATE = frozenset(
    {"forward", "gradient_checkpointing", "hf_device_map", "max_seq_len_cached", "name_or_path", "training"}
)
"""Module attributes that change in use, name files or are set by ``accelerate``."""
_TOKENIZER_STATE = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)
_UNRELATED_TOKENIZER = ("_file", "name_or_path", "cache_dir", "is_local", "local_files_only", "revision", "token")
"""Endings of tokenizer arguments that say where the tokenizer comes from."""


def weights_digest(model: torch.nn.Module) -> str:
    """Hex SHA-256 of all parameters and buffers: their names, shapes, dtypes and bytes.

    Reads every tensor once, also one with several names, on one thread per core (SHA-256 releases the GIL).
    """
    named = list(_named_tensors(model))
    parts = {_storage_key(tensor): tensor for _, tensor in named}
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as threads:
        digests = dict(zip(parts, threads.map(tensor_digest, parts.values()), strict=True))
    return digest_of([[name, digests[_storage_key(tensor)]] for name, tensor in named])


def sample_digest(model: torch.nn.Module) -> str:
    """Hex SHA-256 of the shape, the dtype and some evenly spaced elements of every tensor.

    Detects a model that was not completely read from its files: missing weights are initialised at random.
    """
    return digest_of([[name, tensor_digest(_sample(tensor))] for name, tensor in _named_tensors(model)])


def tensor_digest(tensor: torch.Tensor) -> str:
    """Hex SHA-256 of a tensor's shape, dtype and bytes; a meta tensor has no bytes."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.device.type != "meta":
        flat = tensor.detach().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def modules_digest(model: torch.nn.Module) -> str:
    """Hex SHA-256 of the classes and plain attributes, such as eps, of all modules."""
    return digest_of(
        [[name, _class_name(type(module)), _plain_state(module)] for name, module in model.named_modules()]
    )


def describe_config(config: Any) -> Any:
    """Return a transformers configuration as JSON, without entries that change no answer."""
    return as_json(_drop_unrelated(config.to_dict()))


def describe_attention(config: Any) -> list[str]:
    """List the attention kernels of a configuration and of its nested configurations."""
    nested = [value for name, value in sorted(vars(config).items()) if hasattr(value, "to_dict")]
    return [str(getattr(config, "_attn_implementation", None)), *(k for c in nested for k in describe_attention(c))]


def describe_tokenizer(tokenizer: Any) -> Any:
    """Return all that determines how a tokenizer encodes, decodes and formats chats, as JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # The part before it changes with each call that truncates or pads.
        content = sha256(backend.to_str().partition('"added_tokens":')[2].encode())
    else:
        files = [Path(str(path)) for name, path in sorted(vars(tokenizer).items()) if name.endswith("_file") and path]
        content = digest_of(
            as_json(
                {
                    "vocabulary": sorted(tokenizer.get_vocab().items()),
                    "files": [sha256_file(path) for path in files if path.is_file()],
                    "arguments": _tokenizer_arguments(tokenizer),
                }
            )
        )
    return as_json(
        {
            "class": _class_name(type(tokenizer)),
            "content": content,
            "special": tokenizer.special_tokens_map,
            "state": {name: getattr(tokenizer, name, None) for name in _TOKENIZER_STATE},
            "chat_template": getattr(tokenizer, "chat_template", None),
        }
    )


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, buffers and tensors of quantised parameters, under all their names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter
        yield from ((f"{name}.{part}", tensor) for part, tensor in _quantisation_tensors(parameter))
    yield from model.named_buffers(remove_duplicate=False)


def _quantisation_tensors(parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    state = getattr(parameter, "quant_state", None)
    parts = state.as_dict(packed=True) if state is not None else vars(parameter)
    yield from ((name, value) for name, value in sorted(parts.items()) if isinstance(value, torch.Tensor))


def _storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.device.type == "meta":
        return ("meta", id(tensor))
    return (str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "meta":
        return tensor
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLED)]


def _plain_state(module: torch.nn.Module) -> dict[str, Any]:
    state = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in _UNRELATED_STATE:
            continue
        if value is None or isinstance(value, bool | int | float | str | torch.dtype):
            state[name] = str(value)
        elif isinstance(value, list | tuple | set | frozenset | dict) and _is_plain(value):
            state[name] = repr(sorted(value, key=repr) if isinstance(value, set | frozenset) else value)
        elif inspect.isroutine(value) or inspect.isclass(value):
            state[name] = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"
    return state


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _class_name(kind: type) -> str:
    """Name of a class; a class from a model's own code is named by the digest of its source."""
    if not kind.__module__.startswith("transformers_modules"):
        return f"{kind.__module__}.{kind.__qualname__}"
    source = inspect.getsourcefile(kind)
    return f"{kind.__qualname__} {sha256_file(Path(source)) if source else ''}"


def _drop_unrelated(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _drop_unrelated(part) for name, part in value.items() if _is_related(str(name))}
    return [_drop_unrelated(part) for part in value] if isinstance(value, list | tuple) else value


def _is_related(name: str) -> bool:
    return not name.startswith("_") and name not in _UNRELATED_CONFIG


def _tokenizer_arguments(tokenizer: Any) -> dict[str, Any]:
    given = getattr(tokenizer, "init_kwargs", {})
    return {name: value for name, value in given.items() if not name.endswith(_UNRELATED_TOKENIZER)}


def as_json(value: Any) -> Any:
    """Convert a value for canonical JSON: keys, other types and non-finite numbers become text."""
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
