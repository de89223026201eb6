"""Base and mixture as an ordinary Hugging Face checkpoint, which any server loads."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers.utils.quantization_config import QuantizationMethod

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.adapters.targets import weight_identity
from t2.core.errors import ArgumentError, ModelError, StorageError
from t2.core.files import STALE

ORIGIN = "t2_merge.json"
"""Beside the model's own files: what was merged."""

_GENERATION = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
    "*processor_config.json",
)
"""Patterns of the files that a tokenizer or an image processor may be loaded from."""


def check_free(folder: Path, overwrite: bool) -> None:
    """Check that a folder may be written, before any long work.

    Raises:
        ArgumentError: it exists and holds files, and is not a merged checkpoint that ``overwrite`` allows to replace.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ArgumentError(f"{folder} is a file; name a folder for the checkpoint")
    merged = (folder / ORIGIN).exists()
    if not overwrite or not merged:
        why = "give --overwrite to replace it" if merged else f"it holds no {ORIGIN}, so it is never replaced"
        raise ArgumentError(
            f"{folder} exists and is not empty; name another folder" + (", or " if merged else "; ") + why
        )


def write_merged(
    engine: TransformersEngine,
    tokenizer: Any,
    z: Z | None,
    folder: Path,
    origin: Mapping[str, Any],
    overwrite: bool = False,
    source: Path | None = None,
) -> None:
    """Write base + mixture as a checkpoint folder: safetensors, configuration, tokenizer, and :data:`ORIGIN`.

    The adapted weights are those of the engine's weight form, so a plain ``from_pretrained(folder)`` computes what the
    engine computes. A folder is there whole or not at all: it is written under another name beside it, synced, and
    renamed.

    Args:
        engine: the base model; as it was afterwards.
        tokenizer: its tokenizer, written when ``source`` has no tokenizer files.
        z: the mixture; None is the base.
        folder: the checkpoint's folder.
        origin: what was merged, as JSON.
        overwrite: replace a merged checkpoint that is there.
        source: the folder of the base model. Its tokenizer and generation configuration are copied unchanged.

    Raises:
        ArgumentError: the folder is taken.
        ModelError: the model cannot be saved.
        StorageError: the disk is full, or the folder cannot be written.
    """
    folder = folder.absolute()
    _clear_up(folder)
    check_free(folder, overwrite)
    if any(target.form is not None for target in engine.targets.values()):
        raise ModelError(f"{engine.base.id} is quantised, so its weights cannot hold a mixture; load it unquantised")
    temporary: Path | None = None
    held: int | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        held = os.open(temporary, os.O_RDONLY)
        with contextlib.suppress(OSError):  # not every network file system has locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with engine.applied(z), _savable(engine.model), _without_generation_config(engine.model, source):
            engine.model.save_pretrained(temporary, state_dict=_untied_state(engine.model))
        if source is None or not _copy_tokenizer(source, temporary, tokenizer):
            tokenizer.save_pretrained(temporary)
        if source is not None:
            (temporary / _GENERATION).unlink(missing_ok=True)
            if (source / _GENERATION).exists():
                shutil.copyfile(source / _GENERATION, temporary / _GENERATION)
        (temporary / ORIGIN).write_text(json.dumps(origin, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        _settle(temporary)
        if folder.exists():
            aside = temporary.with_suffix(".old")
            folder.rename(aside)
            try:
                temporary.rename(folder)
            except OSError:
                aside.rename(folder)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(folder)
        temporary = None
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror or error}; free space or choose another folder "
            "(what was there before is unchanged)"
        ) from error
    except safetensors.SafetensorError as error:
        raise StorageError(f"cannot write {folder}: {error}; free space or choose another folder") from error
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{engine.base.id} cannot be saved as a checkpoint ({type(error).__name__}: {error}); load it unquantised"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if held is not None:
            os.close(held)


def _clear_up(folder: Path) -> None:
    """Remove what a killed merge to this folder left beside it, and put back what it had moved out of the way."""
    for found in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if found.suffix == ".old" and not folder.exists():
            found.rename(folder)
        elif found.suffix == ".old":
            shutil.rmtree(found, ignore_errors=True)
        elif found.suffix == ".tmp" and found.is_dir():
            handle = os.open(found, os.O_RDONLY)
            try:
                if time.time() - found.stat().st_mtime > STALE:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(found, ignore_errors=True)
            except OSError:
                pass  # another process writes it
            finally:
                os.close(handle)


@contextlib.contextmanager
def _savable(model: Any) -> Iterator[None]:
    """Inside the context a model whose weights were dequantised while loading counts as the plain one that it is."""
    quantizer, config = getattr(model, "hf_quantizer", None), model.config
    if quantizer is None or quantizer.quantization_config.quant_method != QuantizationMethod.GGUF:
        yield
        return
    quantization = config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    try:
        yield
    finally:
        model.hf_quantizer = quantizer
        if quantization is not None:
            config.quantization_config = quantization


@contextlib.contextmanager
def _without_generation_config(model: Any, source: Path | None) -> Iterator[None]:
    """Replace the generation configuration by the default one if the source's file is copied.

    ``save_pretrained`` refuses some published generation configurations.
    """
    original = getattr(model, "generation_config", None)
    if source is None or original is None:
        yield
        return
    default: Any = transformers.GenerationConfig
    model.generation_config = default()
    try:
        yield
    finally:
        model.generation_config = original


def _copy_tokenizer(source: Path, folder: Path, tokenizer: Any) -> bool:
    """Copy a tokenizer's files; return whether there are any."""
    names = getattr(tokenizer, "vocab_files_names", None) or {}
    own = {str(name) for name in names.values() if name}
    config = source / "tokenizer_config.json"
    code = ["*.py"] if config.exists() and b'"auto_map"' in config.read_bytes() else []
    found = {path for pattern in (*_TOKENIZER_FILES, *own, *code) for path in source.glob(pattern)}
    for path in sorted(found):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    vocabularies = {"tokenizer.json", "tokenizer_config.json", *own}
    return any(path.name in vocabularies for path in found)


def _untied_state(model: Any) -> dict[str, Any] | None:
    """State dict in which only the names that the configuration ties share a weight.

    ``from_pretrained`` ties no other names, so every other name of a shared weight needs a copy in the files.

    Returns:
        None if no other names share a weight.
    """
    state: dict[str, Any] = model.state_dict()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    owners: dict[object, str] = {}
    copies: dict[tuple[object, str], torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            weight, source = weight_identity(value), tied.get(name, name)
            if owners.setdefault(weight, source) != source:
                state[name] = copies.setdefault((weight, source), value.clone())
    return state if copies else None


def _settle(folder: Path) -> None:
    """Sync every file and the folder, and give it the mode of an ordinary one."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
