"""A base that bitsandbytes keeps quantised in memory: adapted as it computes, one matrix at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from t2.adapters.convert.merge import write_merged
from t2.adapters.convert.pair import extract
from t2.adapters.engine.base import GenerateRequest, ScoreRequest
from t2.adapters.engine.likelihood import Branches, LikelihoodModel
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import check_expert
from t2.adapters.quantised import dequantised, keep_form
from t2.adapters.targets import find_targets
from t2.core.errors import ExpertMismatchError, ModelError
from tests.adapters import families
from tests.adapters.checks import check_forms_agree, logits
from tests.adapters.conftest import expert_of, make_tokenizer, random_z

TEXT = tuple(range(5, 30))
FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
# 8-bit layers round what they multiply as well as what by: no dense matrix computes quite the same.
TOLERANCE = {"nf4": 2e-3, "fp4": 2e-3, "int8": 0.1}


def whole(family: str, layers: int = 2) -> transformers.PreTrainedModel:
    """The model before it is quantised, its matrices in whole blocks of 64 numbers."""
    sizes: dict[str, Any] = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    return families.make_model(family, len(make_tokenizer()), layers=layers, **sizes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models of two families, one that stores its matrices transposed."""
    home = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2"):
        whole(family).save_pretrained(home / family)
    return {family: home / family for family in ("llama", "gpt2")}


def load(folder: Path, form: str) -> transformers.PreTrainedModel:
    config = transformers.BitsAndBytesConfig(**FORMS[form])
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    return model


@pytest.fixture(scope="module", params=[*(("llama", form) for form in FORMS), ("gpt2", "nf4")], ids="-".join)
def engine(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TransformersEngine:
    family, form = request.param
    return TransformersEngine(load(folders[family], form), make_tokenizer(), f"{family}-{form}")


def form_of(engine: TransformersEngine) -> str:
    return engine.base.id.partition("-")[2]


def float_twin(engine: TransformersEngine) -> TransformersEngine:
    """An ordinary model of the matrices with which the quantised one computes, for which other tests vouch."""
    twin = whole(engine.base.id.partition("-")[0])
    for name, target in find_targets(twin).items():
        w = engine.targets[name].matrix.float()
        target.parameter.data = (w.T if target.transposed else w).contiguous()
    return TransformersEngine(twin, make_tokenizer(), "twin")


def test_its_matrices_are_those_of_the_family_and_its_fingerprint_is_its_own(
    engine: TransformersEngine, folders: dict[str, Path]
) -> None:
    family = engine.base.id.partition("-")[0]
    original = TransformersEngine(whole(family), make_tokenizer(), "whole")
    assert {n: t.shape for n, t in engine.targets.items()} == {n: t.shape for n, t in original.targets.items()}
    assert {target.form for target in engine.targets.values()} == {form_of(engine)}
    assert not any(target.parameter.is_floating_point() for target in engine.targets.values())
    assert engine.precision == f"{form_of(engine)}+float32"
    assert engine.base.fingerprint != original.base.fingerprint
    assert engine.base.fingerprint == float_twin(engine).base.fingerprint
    for name, target in engine.targets.items():
        w = original.targets[name].matrix
        assert target.matrix.shape == w.shape
        assert float((target.matrix - w).norm()) < 0.15 * float(w.norm())


def test_an_expert_of_the_whole_model_asks_for_strict_transfer(
    engine: TransformersEngine, folders: dict[str, Path]
) -> None:
    original = TransformersEngine(whole(engine.base.id.partition("-")[0]), make_tokenizer(), "whole")
    expert = expert_of(original, "whole", random_z(original, 1))
    with pytest.raises(ExpertMismatchError, match="names and ranks agree, so transfer=strict applies it all the same"):
        check_expert(expert, engine.base, engine.ranks())


def test_both_forms_are_the_mathematics_of_the_matrices_it_computes_with(engine: TransformersEngine) -> None:
    z, twin, tolerance = random_z(engine, 1, 0.2), float_twin(engine), TOLERANCE[form_of(engine)]
    with twin.applied(z):
        dense = logits(twin, TEXT)
    base = logits(engine, TEXT)
    assert float((base - logits(twin, TEXT)).abs().mean()) < tolerance
    with engine.applied(z):
        by_hooks = logits(engine, TEXT)
    with engine.activation([z]):
        assert torch.equal(logits(engine, TEXT), by_hooks)
    assert float((by_hooks - dense).abs().mean()) < tolerance
    assert float((base - dense).abs().mean()) > 2 * tolerance
    assert torch.equal(logits(engine, TEXT), base)
    ones = {name: torch.ones(rank) for name, rank in engine.ranks().items()}
    for context in (engine.applied(ones), engine.activation([ones]), engine.applied(None)):
        with context:
            assert torch.equal(logits(engine, TEXT), base)


def test_a_mixed_batch_answers_as_one_run_per_mixture(folders: dict[str, Path]) -> None:
    engine = TransformersEngine(load(folders["llama"], "nf4"), make_tokenizer(), "nf4")
    rows = [0, 1, 2, 0]
    generates = [GenerateRequest(TEXT[: 3 + i], 8) for i in rows]
    scores = [ScoreRequest(TEXT[:4], TEXT[4 : 6 + i]) for i in rows]
    answers = check_forms_agree(engine, [random_z(engine, 1), None, random_z(engine, 2)], rows, generates, scores)
    assert [a == b for a, b in zip(answers, engine.generate(generates), strict=True)] == [False, True, False, False]


def test_gradients_of_z_are_those_through_the_dense_weights(folders: dict[str, Path]) -> None:
    engine = TransformersEngine(load(folders["llama"], "nf4"), make_tokenizer(), "llama-nf4")
    item, gradients = Branches(TEXT[:5], (TEXT[5:8],)), []
    for own in (engine, float_twin(engine)):
        z = {name: vector.requires_grad_() for name, vector in random_z(engine, 5, 0.2).items()}
        with own.activation([z]):
            loglikelihoods = LikelihoodModel(own.model, share=False).run([item]).loglikelihoods()
        gradients.append(torch.autograd.grad(loglikelihoods.sum(), list(z.values())))
    for ours, theirs in zip(*gradients, strict=True):
        assert float(theirs.abs().max()) > 0
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=2e-3 * float(theirs.abs().max()))


class Dequantised(TorchDispatchMode):
    """Sees every operation: how many matrices are dequantised, how many of them live at once, the bytes of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.living = self.most = 0
        self.bytes = self.most_bytes = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self._watch(tensor, "dequant" in str(func) and tensor.dim() == 2)
        return out

    def _watch(self, tensor: torch.Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._storages:
            return
        size, key = storage.nbytes(), storage.data_ptr()
        self._storages.add(key)
        self.made, self.living, self.bytes = self.made + counts, self.living + counts, self.bytes + size
        self.most, self.most_bytes = max(self.most, self.living), max(self.most_bytes, self.bytes)
        weakref.finalize(storage, self._gone, key, size, counts)

    def _gone(self, key: int, size: int, counts: bool) -> None:
        self._storages.discard(key)
        self.living, self.bytes = self.living - counts, self.bytes - size


@pytest.fixture
def many_layers(tmp_path: Path) -> tuple[Path, int]:
    """A saved model of many layers, and the bytes of its matrices in float32."""
    model = whole("llama", layers=12)
    model.save_pretrained(tmp_path)
    return tmp_path, sum(4 * target.matrix.numel() for target in find_targets(model).values())


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_never_more_than_one_matrix_is_dequantised(
    form: str, many_layers: tuple[Path, int], bases_folder: Path
) -> None:
    folder, dense = many_layers
    model, largest = load(folder, form), 4 * 64 * 128
    with Dequantised() as built:
        engine = TransformersEngine(model, make_tokenizer(), form)
        z = {name: torch.full((rank,), 1.1) for name, rank in engine.ranks().items()}
        list(bases_of(engine))
    # Once each for the fingerprint and for the basis; in the double precision of the decomposition at most.
    assert built.made == 2 * len(engine.targets)
    assert built.most == 1
    with Dequantised() as used, engine.applied(z):
        logits(engine, TEXT)
    assert used.most <= 1
    bases = sum(4 * rank * (rank + 1) for rank in engine.ranks().values())
    assert built.most_bytes - bases < 12 * largest < dense / 3


def bases_of(engine: TransformersEngine) -> Iterator[int]:
    for name in engine.ranks():
        yield engine.bases([name], progress=False)[name].rank


@pytest.mark.parametrize("packed", [False, True])
def test_use_does_not_change_a_matrix_also_where_the_cpu_has_a_packing_of_its_own(packed: bool) -> None:
    torch.manual_seed(0)
    layer: Any = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    weight: Any = Params4bit(torch.randn(64, 64), quant_type="nf4", requires_grad=False)
    layer.weight = weight.to("cpu")
    plain, x = dequantised(layer), torch.randn(3, 64)
    if packed:
        layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
    layer.support_avx512bf16_for_cpu = True
    keep_form(nn.Sequential(layer))
    with torch.no_grad():
        y = layer(x)
    # The packing holds scales in bfloat16.
    assert torch.allclose(dequantised(layer), plain, rtol=1e-2 if packed else 0, atol=0)
    assert torch.allclose(y, x @ dequantised(layer).T, atol=1e-4)


def test_neither_merged_nor_compared_with_a_tuned_model(engine: TransformersEngine, tmp_path: Path) -> None:
    z = random_z(engine, seed=1)
    with pytest.raises(ModelError, match="load it unquantised"):
        write_merged(engine, engine.tokenizer, z, tmp_path / "merged", {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelError, match="load it unquantised"):
        extract(engine, dict(whole(engine.base.id.partition("-")[0]).state_dict()), "tuned")
