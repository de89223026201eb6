"""Adapters of PEFT in their folders: read and checked before a model loads, and put into it as PEFT does."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import transformers

from t2.core.digests import sha256_file
from t2.core.errors import ArgumentError, DependencyError, ExpertFileError, ExpertMismatchError
from t2.core.manifest import BaseModelRef, Manifest

CONFIG, WEIGHTS, TRAINING = "adapter_config.json", "adapter_model.safetensors", "training.json"
"""The last one is what ``t2 train`` says of an adapter, as the manifest of an expert does."""
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_out")
"""PEFT may write these beside an adapter; they are the base's then."""


@dataclass(frozen=True)
class PeftFolder:
    """A folder that PEFT's ``save_pretrained`` wrote.

    Attributes:
        path: the folder.
        kind: PEFT's name of the method, such as ``LORA``.
        digest: hex SHA-256 of its weights file.
        config: hex SHA-256 of its ``adapter_config.json``, without which the weights mean nothing.
        numbers: how many it has; embeddings that PEFT wrote beside it are the base's.
        manifest: what ``t2 train`` says of it; None for an adapter from elsewhere.
    """

    path: Path
    kind: str
    digest: str
    config: str
    numbers: int
    manifest: Manifest | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name


def require_peft(what: str) -> None:
    """Check that PEFT can be imported.

    Raises:
        DependencyError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise DependencyError(f'{what} needs PEFT: pip install "t2-eval[eval]"')


def read_folder(path: str | Path) -> PeftFolder:
    """Look at an adapter's folder, without a model.

    Raises:
        ArgumentError: it is no folder of an adapter.
        DependencyError: PEFT is not installed.
        ExpertFileError: its files cannot be read, or are pickled.
    """
    require_peft("adapt=peft")
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file():
        missing = f"has no {CONFIG}" if folder.is_dir() else "does not exist here"
        raise ArgumentError(f"peft={path} {missing}; name a folder that PEFT's save_pretrained wrote")
    if not (folder / WEIGHTS).is_file():
        pickled = " and adapter_model.bin is a pickle, which t2 does not load" * (folder / "adapter_model.bin").exists()
        raise ExpertFileError(f"peft={path} has no {WEIGHTS}{pickled}; save the adapter with safetensors")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        kind, trained = str(config["peft_type"]), config.get("modules_to_save") or ()
        numbers = sum(size for name, size in _sizes(folder).items() if not _is_of_base(name, trained))
        told = (folder / TRAINING).read_bytes() if (folder / TRAINING).exists() else None
        manifest = Manifest.model_validate_json(told) if told is not None else None
        digests = sha256_file(folder / WEIGHTS), sha256_file(folder / CONFIG)
        return PeftFolder(folder, kind, *digests, numbers, manifest)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ExpertFileError(
            f"peft={path} cannot be read ({type(error).__name__}: {error}); save the adapter again"
        ) from error


def put_in(
    model: transformers.PreTrainedModel, adapter: PeftFolder, base: BaseModelRef, revision: str | None = None
) -> Any:
    """Put an adapter into a model, which changes in place, by ``PeftModel.from_pretrained`` as lm-eval's ``hf`` does.

    Args:
        model: the base model.
        adapter: what :func:`read_folder` found.
        base: the model as loaded; what was trained by t2 names the weights that it belongs to.
        revision: as ``hf`` hands it on.

    Returns:
        The ``PeftModel``.

    Raises:
        ExpertMismatchError: its matrices are not those of this model, in name, number or shape, or it was trained on
            other weights.
    """
    import peft

    own = adapter.manifest.base if adapter.manifest is not None else None
    if own is not None and own.fingerprint != base.fingerprint:
        raise ExpertMismatchError(
            f"peft={adapter.path} was trained on other weights ({own.id}, fingerprint {own.fingerprint[:12]}) than "
            f"{base.id} ({base.fingerprint[:12]}) has; name an adapter of {base.id}"
        )
    try:
        with warnings.catch_warnings():
            # What is missing is an error below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            # PEFT asks for what transformers now calls otherwise.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted = peft.PeftModel.from_pretrained(model, str(adapter.path), revision=revision)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())[:200]
        raise ExpertMismatchError(
            f"peft={adapter.path} does not fit {base.id} ({type(error).__name__}: {told}); name an adapter of {base.id}"
        ) from error
    wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    given = set(_sizes(adapter.path))
    odd = sorted(wanted - given) or sorted(name for name in given - wanted if not any(e in name for e in _EMBEDDINGS))
    if odd:
        raise ExpertMismatchError(
            f"peft={adapter.path} was made for another model than {base.id}: {odd[0]} is in only one of them; name "
            f"an adapter of {base.id}"
        )
    return adapted


def _sizes(folder: Path) -> dict[str, int]:
    with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _is_of_base(name: str, trained: Collection[str]) -> bool:
    """Whether a tensor is a whole embedding; an adapter's additions to it have other names."""
    module = name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
    return name.endswith(".weight") and module in _EMBEDDINGS and module not in trained
