"""The adaptable matrices of a checkpoint, read one by one: its model is never in memory.

Which matrices these are, and their names and shapes, is asked of the model that the checkpoint's configuration
describes, made on the ``meta`` device, where tensors have no numbers. What the matrices are called in the files, and
whether a file holds several as one, is asked of ``transformers``, which renames and splits in the same way when it
loads the model. Names, digests and fingerprint are therefore those of the loaded model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.hub import cached_file

from t2.adapters.basis import matrix_digest
from t2.adapters.targets import Ranks, Target, find_targets, left_out, parameter_names
from t2.core.errors import ModelError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Outline:
    """A model without its weights.

    Attributes:
        model: it, on the ``meta`` device.
        targets: its adaptable matrices, by the names that experts know them by.
        parameters: every parameter name of each target in the whole model, which may be more than a text model.
        left_out: result of :func:`t2.adapters.targets.left_out`.
    """

    model: transformers.PreTrainedModel
    targets: Mapping[str, Target]
    parameters: Mapping[str, tuple[str, ...]]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class _Source:
    """What a parameter is made of: tensors of the files and, where it is not one of them as it is, how."""

    tensors: list[tuple[str, str | None]] = field(default_factory=list)
    converter: WeightConverter | None = None


class Checkpoint:
    """A checkpoint in safetensors files whose matrices are read when they are asked for.

    Args:
        pretrained: its folder, or its name on the Hub; see :func:`open_checkpoint`.
        revision: of the Hub.
        moe: as for :func:`t2.adapters.targets.find_targets`.
        outline: the model that it is of.
        files: the file of each tensor, by the tensor's name.

    Raises:
        ModelError: it lacks an adaptable matrix.
    """

    def __init__(
        self, pretrained: str, revision: str | None, moe: str, outline: Outline, files: Mapping[str, Path]
    ) -> None:
        self.pretrained, self.revision, self.moe = pretrained, revision, moe
        self._outline = outline
        self._files = files
        self._sources = self._find_sources()
        self._untie()
        for name in self.targets:
            if not self._stored_names(name):
                raise ModelError(
                    f"{pretrained} has no tensor for {name}; it is not whole, or not of the model that its config.json "
                    "describes"
                )

    @property
    def targets(self) -> Mapping[str, Target]:
        """Its adaptable matrices, by the names that experts know them by."""
        return self._outline.targets

    @property
    def left_out(self) -> Mapping[str, int]:
        """Weights of the decoder layers that are not adapted: :func:`t2.adapters.targets.left_out`."""
        return self._outline.left_out

    @property
    def files(self) -> list[Path]:
        """The files that hold it."""
        return sorted(set(self._files.values()))

    @property
    def places(self) -> Mapping[str, Path]:
        """The file of each of its tensors, by the tensor's name."""
        return self._files

    def keys(self, name: str) -> list[str]:
        """Names of the tensors that hold only this matrix: one, or one per layer that shares it.

        Raises:
            ModelError: its files hold the matrix in one with others, or in parts.
        """
        sources = [self._sources[parameter] for parameter in self._stored_names(name)]
        if any(source.converter is not None for source in sources):
            raise ModelError(
                f"{self.pretrained}: {name} is not a tensor of its own in the files, so it cannot be changed alone"
            )
        return list(dict.fromkeys(source.tensors[0][0] for source in sources))

    def matrix(self, name: str) -> torch.Tensor:
        """W of shape (m, n), in the checkpoint's dtype.

        Nothing of it is kept here: while the tensor lives, so does the map of its file.

        Raises:
            ModelError: its file cannot be read, or the matrix has another shape than the configuration says.
        """
        target, (parameter, *_) = self.targets[name], self._stored_names(name)
        stored = self._load_stored(parameter, name)
        w = stored.T if target.transposed else stored
        if tuple(w.shape) != target.shape:
            raise ModelError(
                f"{self.pretrained}: {name} has shape {tuple(w.shape)} and its config.json says {target.shape}"
            )
        if not w.dtype.is_floating_point or w.dtype.itemsize < 2:
            raise ModelError(
                f"{self.pretrained}: {name} is quantised ({w.dtype}), which is not read matrix by matrix; "
                "use the checkpoint that it was made of, or load the model, which builds its bases when they are needed"
            )
        return w

    def _stored_names(self, name: str) -> list[str]:
        """Names of a matrix in the whole model that the files contain."""
        return [parameter for parameter in self._outline.parameters[name] if parameter in self._sources]

    def _load_stored(self, parameter: str, name: str) -> torch.Tensor:
        """Load a parameter in the layout of the whole model; ``name`` is for messages."""
        source = self._sources[parameter]
        if source.converter is None:
            return self._read(source.tensors[0][0])
        converter: Any = copy.deepcopy(source.converter)
        for key, pattern in source.tensors:
            converter.add_tensor(parameter, key, pattern, self._read(key))
        converted = converter.convert(parameter, model=self._outline.model, config=self._outline.model.config)
        if parameter not in converted:
            sources = ", ".join(key for key, _ in source.tensors)
            raise ModelError(f"{self.pretrained}: {name} cannot be converted from {sources}")
        value = converted[parameter]
        stored: torch.Tensor = value[0] if isinstance(value, list) else value
        return stored

    def _untie(self) -> None:
        """Untie the weights that the configuration ties but whose copies in the files differ.

        ``transformers`` does the same when it loads a model: it ties two weights only where they are equal.
        """
        model = self._outline.model
        ties: dict[str, list[str]] = {}
        for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
            ties.setdefault(source, []).append(tied)
        apart = []
        for name, parameters in self._outline.parameters.items():
            for source in set(parameters).intersection(ties):
                first, *others = [own for own in (source, *ties[source]) if own in self._sources] or [source]
                apart += [other for other in others if not self._are_equal(first, other, name)]
        for parameter in apart:
            module: Any = model.get_submodule(parameter.rpartition(".")[0])
            module.weight = torch.nn.Parameter(torch.empty_like(module.weight))
        if apart:
            self._outline = _build_outline(model, self.moe)

    def _are_equal(self, one: str, other: str, name: str) -> bool:
        return torch.equal(self._load_stored(one, name), self._load_stored(other, name))

    def matrices(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and matrices in turn, those of ``names`` or all; hold on to one at a time to keep memory bounded."""
        for name in self.targets if names is None else names:
            yield name, self.matrix(name)

    def digests(self) -> dict[str, str]:
        """:func:`t2.adapters.basis.matrix_digest` of every adaptable matrix, by name; reads the whole checkpoint."""
        return {name: matrix_digest(matrix) for name, matrix in self.matrices()}

    def fingerprint(self) -> str:
        """The model's fingerprint; reads the whole checkpoint."""
        return Ranks(self.targets, self.digests()).fingerprint

    def _read(self, key: str) -> torch.Tensor:
        path = self._files[key]
        try:
            # Opened each time: pages of a map count as this process's memory until it is closed.
            with safetensors.safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(key)
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(
                f"{self.pretrained}: cannot read {key} of {path}: {error}; fetch the file again"
            ) from error
        return tensor

    def _find_sources(self) -> dict[str, _Source]:
        """What each adaptable parameter is made of, as ``transformers`` says."""
        model = self._outline.model
        wanted = {name for names in self._outline.parameters.values() for name in names}
        known = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        sources: dict[str, _Source] = {}
        for key in sorted(self._files):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
            if pattern is None:
                if name in wanted:
                    sources[name] = _Source([(key, None)])
                continue
            converter = by_pattern[pattern]
            first = converter.target_patterns[0]
            # A tensor that is split is named after its first part.
            made = {name.replace(first, target) for target in converter.target_patterns} if name in known else set()
            for part in made & wanted:
                sources.setdefault(part, _Source([], converter)).tensors.append((key, pattern))
        return sources


def outline(pretrained: str, revision: str | None = None, moe: str = "refuse") -> Outline:
    """A model without its weights, of a ``config.json`` alone.

    Args:
        pretrained: a folder with it, the file itself, or a model of the Hub.
        revision: of the Hub.
        moe: as for :func:`t2.adapters.targets.find_targets`.

    Raises:
        ModelError: there is no configuration, it is not one of a decoder-only language model that ``transformers``
            knows, it is quantised, or such a model has nothing to adapt.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(pretrained, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"cannot read the configuration of {pretrained}: {first}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{pretrained} is quantised, which is not read matrix by matrix; use the checkpoint that it was made of, "
            "or load the model, which builds its bases when they are needed"
        )
    auto: Any
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = transformers.AutoModelForCausalLM
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto = transformers.AutoModelForImageTextToText
    else:
        raise ModelError(f"{pretrained} ({config.model_type}) is not a decoder-only language model, nor has one in it")
    try:
        with torch.device("meta"):
            model: transformers.PreTrainedModel = auto.from_config(config, dtype=torch.bfloat16)
    except (ValueError, TypeError, RuntimeError, ImportError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(
            f"the configuration of {pretrained} makes no model: {type(error).__name__}: {error}"
        ) from error
    return _build_outline(model, moe)


def _build_outline(model: transformers.PreTrainedModel, moe: str) -> Outline:
    targets = find_targets(model, moe=moe, weights=False)
    return Outline(model, targets, parameter_names(model, targets), left_out(model, targets))


def open_checkpoint(pretrained: str, revision: str | None = None, moe: str = "refuse") -> Checkpoint:
    """Open a checkpoint in one or more safetensors files; what is not in the Hub's cache is downloaded.

    Args:
        pretrained: its folder, or its name on the Hub.
        revision: of the Hub.
        moe: as for :func:`t2.adapters.targets.find_targets`.

    Raises:
        ModelError: as :func:`outline` says; or its weights are absent, damaged, or not in safetensors files.
    """
    if pretrained.endswith(".gguf") or _only_gguf(Path(pretrained)):
        raise ModelError(
            f"{pretrained} is a GGUF file, which is not read matrix by matrix; use the safetensors checkpoint, or load "
            "the model with gguf_file=, which builds its bases when they are needed"
        )
    model = outline(pretrained, revision, moe)
    return Checkpoint(pretrained, revision, moe, model, _files(pretrained, revision))


def has_weights(pretrained: str) -> bool:
    """Whether the weights of a checkpoint are in a folder of this machine; nothing is fetched to find out."""
    return any((Path(pretrained) / name).is_file() for name in (_SINGLE, _INDEX))


def _only_gguf(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.gguf")) and not (folder / "config.json").exists()


def _files(pretrained: str, revision: str | None) -> dict[str, Path]:
    """The file of each tensor of a checkpoint."""
    single = _find(pretrained, _SINGLE, revision)
    if single is not None:
        return dict.fromkeys(_keys(single), single)
    index = _find(pretrained, _INDEX, revision)
    if index is None:
        raise ModelError(
            f"{pretrained} has no {_SINGLE} and no {_INDEX}; load the model with transformers and write it anew with "
            "save_pretrained"
        )
    try:
        content = json.loads(index.read_text())
        places: dict[str, str] = {str(key): str(name) for key, name in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not an index of safetensors files; fetch it again") from error
    shards: dict[str, Path] = {}
    for name in sorted(set(places.values())):
        path = None if Path(name).name != name else _find(pretrained, name, revision)
        if path is None:
            raise ModelError(f"{pretrained} lacks the file {name}, which its index names; fetch it again")
        shards[name] = path
    held = {path: _keys(path) for path in shards.values()}
    for key, name in places.items():
        if key not in held[shards[name]]:
            raise ModelError(f"{shards[name]} lacks {key}, which its index says is there; fetch it again")
    return {key: shards[name] for key, name in places.items()}


def _find(pretrained: str, name: str, revision: str | None) -> Path | None:
    if Path(pretrained).is_dir():
        path = Path(pretrained) / name
        return path if path.is_file() else None
    try:
        found = cached_file(pretrained, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"cannot fetch {name} of {pretrained}: {first}") from error
    return Path(found) if found is not None else None


def _keys(path: Path) -> set[str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"cannot read {path}: {error}; fetch the file again") from error
