"""Checkpoints of Transformer²'s public code, read without running what a pickle may hold.

There z = sigmoid(p)·max_mult in bfloat16, and W′ = U·diag(σ⊙z)·Vᵀ · Σσ / Σ(σ⊙z), so that the nuclear norm stays that
of W. Such an expert is exactly one of the paper's form, W′ = U·diag(σ⊙z_eff)·Vᵀ, with

    z_eff = z · Σσ / Σ(σ⊙z)        matrix by matrix.

σ is the base model's, which the checkpoint does not name: only the number and the ranks of its vectors can be checked.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z, by_weight
from t2.adapters.targets import aliases_of, language_modules
from t2.core.digests import sha256_file
from t2.core.errors import ArgumentError, ExpertFileError, ExpertMismatchError, nearest

Form = Literal["policy_params", "learnable_params"]

_LISTED = re.compile(r"learnable_params_module_list\.(\d+)")
_MIXED = ("adaptive_weights", "weights_0_k_")
_ADAPTED = "mlp"
"""The public code adapts the matrices that have this in their name."""


@dataclass(frozen=True)
class PublicCheckpoint:
    """A checkpoint of the public code.

    Attributes:
        source: its file, for messages.
        form: ``policy_params`` is a state dict that numbers the vectors, ``learnable_params`` a dict that names them.
        params: raw p, of shape (r,) each: by its number as text, or by parameter name.
        digest: hex SHA-256 of the file.
    """

    source: str
    form: Form
    params: dict[str, torch.Tensor]
    digest: str


def read_public(path: Path) -> PublicCheckpoint:
    """Read ``policy_params.pt`` or ``learnable_params.pt``; which of the two is told by the content.

    Only tensors and plain containers are unpickled; a file that names anything else is refused before it can run.

    Raises:
        ExpertFileError: the file cannot be read, holds other objects, or is neither of the two.
    """
    if not path.is_file():
        raise ExpertFileError(f"{path} is not a file; name a policy_params.pt or learnable_params.pt")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {named[1]}, which loading would call" if named else "it is no pickle of tensors"
        raise ExpertFileError(
            f"{path} was not opened: {what}; only files that hold nothing but tensors are read"
        ) from error
    except OSError as error:
        raise ExpertFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
        # What PyTorch says here may advise to unpickle all the same.
        raise ExpertFileError(
            f"{path} cannot be read as a PyTorch file ({type(error).__name__}): it is truncated, or of another kind"
        ) from error
    if not isinstance(content, Mapping):
        raise ExpertFileError(
            f"{path} holds a {type(content).__name__} and no dict of vectors, as the public code saves"
        )
    if not content:
        raise ExpertFileError(f"{path} holds an empty dict, and no vectors")
    params: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ExpertFileError(f"{path}: its entry {key!r} is not a named tensor, as in a file of the public code")
        params[key] = value.detach()
    if any(key.startswith(_MIXED) for key in params):
        raise ExpertFileError(
            f"{path} is a mixture of the public code's few-shot search; import the experts that it mixes, one by one"
        )
    for key, value in params.items():
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ExpertFileError(f"{path}: {key} is a {value.layout} tensor on {value.device} and no ordinary vector")
        if value.dim() != 1 or not value.is_floating_point() or not value.numel():
            raise ExpertFileError(
                f"{path}: {key} has shape {tuple(value.shape)} and type {value.dtype}; a raw p is one vector of numbers"
            )
        if not bool(torch.isfinite(value).all()):
            raise ExpertFileError(f"{path}: {key} holds values that are not finite")
    digest = sha256_file(path)
    numbers = {key: _LISTED.fullmatch(key) for key in params}
    if not all(numbers.values()):
        odd = next((key for key, match in numbers.items() if match is None), "")
        if any(numbers.values()):
            raise ExpertFileError(f"{path} has {odd} beside numbered vectors, so it is not a file of the public code")
        return PublicCheckpoint(str(path), "learnable_params", params, digest)
    listed = {match[1]: params[key] for key, match in numbers.items() if match}
    absent = next((i for i in range(len(listed)) if str(i) not in listed), None)
    if absent is not None:
        raise ExpertFileError(f"{path} has {len(listed)} vectors, but none is number {absent}; it is incomplete")
    # As the public code's policy, whose parameters are bfloat16, takes them up.
    rounded = {str(i): listed[str(i)].to(torch.bfloat16) for i in range(len(listed))}
    return PublicCheckpoint(str(path), "policy_params", rounded, digest)


def public_z(p: torch.Tensor, max_mult: float = 1.0) -> torch.Tensor:
    """z = sigmoid(p)·max_mult, rounded as the public code rounds it; shape (r,), bfloat16."""
    return torch.sigmoid(p).to(torch.bfloat16) * max_mult


def effective_z(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """z_eff = z · Σσ / Σ(σ⊙z), in float64, rounded once to float32.

    Args:
        z: shape (r,).
        sigma: singular values of the matrix, shape (r,).

    Raises:
        ValueError: Σ(σ⊙z) is zero or not finite.
    """
    wide, values = z.double(), sigma.cpu().double()
    moved = float((values * wide).sum())
    if not math.isfinite(moved) or moved == 0:
        raise ValueError(f"Σ(σ⊙z) is {moved}")
    return (wide * (float(values.sum()) / moved)).float()


def public_targets(engine: TransformersEngine) -> list[str]:
    """Names of the matrices that the public code adapts, those with ``mlp``, in model order.

    The public code adapts a shared weight under each of its names, so all of them are listed.
    """
    every = {*engine.targets, *aliases_of(engine.targets)}
    names = (f"{name}.weight" for name, _ in language_modules(engine.model))
    return [name for name in names if name in every and _ADAPTED in name]


def import_public(checkpoint: PublicCheckpoint, engine: TransformersEngine, max_mult: float = 1.0) -> Z:
    """The expert that a checkpoint of the public code is on a base model.

    Args:
        checkpoint: from :func:`read_public`.
        engine: the base model that it was trained on.
        max_mult: the ``max_mult`` of the run's configuration. z_eff depends on it through rounding alone.

    Raises:
        ArgumentError: ``max_mult`` is not above zero.
        ExpertMismatchError: number, names or ranks of its vectors are not those of the model's MLP matrices, or two
            names of one weight have different vectors.
        ExpertFileError: a vector takes its matrix to norm zero.
    """
    if not (math.isfinite(max_mult) and max_mult > 0):
        raise ArgumentError(f"max_mult={max_mult} must be a number above 0")
    named = _named(checkpoint, engine, public_targets(engine))
    named = by_weight(named, aliases_of(engine.targets), checkpoint.source)
    bases = engine.bases(named)
    effective: Z = {}
    for name, p in named.items():
        try:
            effective[name] = effective_z(public_z(p, max_mult), bases[name].sigma)
        except ValueError as error:
            raise ExpertFileError(f"{checkpoint.source}: the vector of {name} gives no matrix ({error})") from error
    return effective


def _named(checkpoint: PublicCheckpoint, engine: TransformersEngine, targets: Sequence[str]) -> dict[str, torch.Tensor]:
    base, params, aliases = engine.base.id, checkpoint.params, aliases_of(engine.targets)
    ranks = {name: engine.ranks()[aliases.get(name, name)] for name in targets}
    if checkpoint.form == "policy_params":
        if len(params) != len(targets):
            raise ExpertMismatchError(
                f"{checkpoint.source} has {len(params)} vectors, {base} has {len(targets)} MLP matrices; give the base "
                "model that it was trained on with --model-args"
            )
        named = dict(zip(targets, params.values(), strict=True))
    else:
        for name in params:
            if name not in targets:
                raise ExpertMismatchError(
                    f"{checkpoint.source} scales {name}, which is no MLP matrix of {base}{nearest(name, targets)}"
                )
        absent = [name for name in targets if name not in params]
        if absent:
            raise ExpertMismatchError(
                f"{checkpoint.source} has {len(params)} vectors and none for {absent[0]}, {base} has {len(targets)} "
                "MLP matrices; load the base model that it was trained on"
            )
        named = {name: params[name] for name in targets}
    for number, (name, p) in enumerate(named.items()):
        if len(p) != ranks[name]:
            raise ExpertMismatchError(
                f"{checkpoint.source}: vector {number} has {len(p)} values, {name} of {base} has rank {ranks[name]}; "
                "load the base model that it was trained on"
            )
    return named
