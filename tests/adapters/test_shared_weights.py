"""Weights that several layers share: one matrix, adapted once, in every layer that uses it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from t2.adapters.basis import fingerprint
from t2.adapters.checkpoint import open_checkpoint
from t2.adapters.convert.merge import write_merged
from t2.adapters.convert.pair import extract
from t2.adapters.convert.public import import_public, public_targets, read_public
from t2.adapters.engine.base import GenerateRequest, ScoreRequest
from t2.adapters.engine.checkpointing import checkpointed
from t2.adapters.engine.peft import PeftEngine, PeftForm
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.engine.vllm_worker import Place, Plan, Weights
from t2.adapters.expert import Expert, Z, check_expert
from t2.adapters.targets import choose, find_targets
from t2.core.errors import ExpertMismatchError
from t2.harness.experts import fit_expert
from tests.adapters import families
from tests.adapters.checks import check_forms_agree, logits, weights
from tests.adapters.conftest import expert_of, make_model, make_tokenizer, random_z

CONFIGS: Any = transformers
UP = "model.layers.{}.mlp.up_proj.weight"
ZAMBA2 = "model.layers.{}.shared_transformer.self_attn.q_proj.weight"


def encode(text: str) -> tuple[int, ...]:
    return tuple(make_tokenizer().encode(text, add_special_tokens=False))


def zamba2() -> Any:
    """Blocks 0 and 1 are used in layers 1 and 2, and again in layers 4 and 5."""
    torch.manual_seed(0)
    config = CONFIGS.Zamba2Config(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        layers_block_type=["mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid"],
        num_attention_heads=4,
        num_key_value_heads=4,
        num_mem_blocks=2,
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=2,
        chunk_size=8,
        adapter_rank=4,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def of_one_parameter() -> Any:
    model: Any = make_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.self_attn.q_proj.weight = first.self_attn.o_proj.weight
    return model


def of_one_module() -> Any:
    model: Any = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def of_views() -> Any:
    """Two parameters over the same memory, one of them transposed."""
    model: Any = make_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = nn.Parameter(first.mlp.up_proj.weight.data)
    second.mlp.down_proj.weight = nn.Parameter(first.mlp.gate_proj.weight.data.T)
    return model


def of_both_layouts() -> Any:
    """One parameter that GPT-2's kind of layer reads as in × out and a linear layer as out × in."""
    model: Any = make_model("gpt2")
    first, second = (block.mlp for block in model.transformer.h)
    assert isinstance(first.c_proj, Conv1D)
    bias = second.c_fc.bias
    second.c_fc = nn.Linear(32, 128)
    second.c_fc.weight, second.c_fc.bias = first.c_proj.weight, bias
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "zamba2": zamba2,
    "one parameter": of_one_parameter,
    "one module": of_one_module,
    "views": of_views,
    "both layouts": of_both_layouts,
}


@pytest.fixture(scope="module", params=MODELS)
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    return TransformersEngine(MODELS[request.param](), make_tokenizer(), request.param, batch_size=4)


def dense(engine: TransformersEngine, z: Z) -> torch.Tensor:
    """Logits of a fresh model whose weights are each overwritten once, by a full decomposition."""
    model = MODELS[engine.base.id]().eval()
    done: set[int] = set()
    with torch.no_grad():
        for name, target in find_targets(model).items():
            assert target.parameter.data_ptr() not in done
            done.add(target.parameter.data_ptr())
            if name in z:
                u, sigma, vt = torch.linalg.svd(target.matrix.double(), full_matrices=False)
                target.matrix.copy_(((u * (sigma * z[name].double())) @ vt).float())
        out: torch.Tensor = model(torch.tensor([encode("the stop 12 ab")])).logits[0]
    return out


def test_each_weight_is_one_matrix_under_its_first_name(engine: TransformersEngine) -> None:
    shared = {name: target for name, target in engine.targets.items() if target.aliases}
    assert shared
    held = [parameter.data_ptr() for parameter in engine.model.parameters()]
    for name, target in shared.items():
        state = engine.model.state_dict(keep_vars=True)
        assert {state[other].data_ptr() for other in (name, *target.aliases)} == {target.parameter.data_ptr()}
        assert target.parameter.data_ptr() in held
        assert not set(target.aliases).intersection(engine.targets)
    assert len({target.parameter.data_ptr() for target in engine.targets.values()}) == len(engine.targets)


def test_every_form_changes_a_shared_weight_once_and_the_base_comes_back(engine: TransformersEngine) -> None:
    z, tokens = random_z(engine, 1, 0.2), encode("the stop 12 ab")
    base, before = logits(engine, tokens), weights(engine)
    expected = dense(engine, z)
    assert not torch.allclose(base, expected, atol=0.1)
    first = None
    for _ in range(3):  # the third uses the kept weights
        with engine.applied(z):
            found = logits(engine, tokens)
        assert first is None or torch.equal(first, found)
        first = found
        assert torch.allclose(found, expected, atol=1e-3)
        assert weights(engine) == before
        assert torch.equal(logits(engine, tokens), base)
    with engine.activation([z]):
        assert torch.allclose(logits(engine, tokens), expected, atol=1e-3)
    with engine.trained(z):
        assert torch.allclose(logits(engine, tokens), expected, atol=1e-3)
    experts = [z, random_z(engine, 2, 0.1)]
    mixtures = [{n: 1 + a * (z[n] - 1) for n in z} for a in (1.0, 0.5, 0.2, 0.1)]
    with engine.switching(experts, mixtures), engine.applied(mixtures[0]):
        assert torch.allclose(logits(engine, tokens), expected, atol=1e-3)
    assert weights(engine) == before
    assert torch.equal(logits(engine, tokens), base)


def test_rows_of_a_batch_have_mixtures_of_their_own(engine: TransformersEngine) -> None:
    prompts = ["the cat sat", "1 + 2 = ab"]
    generates = [GenerateRequest(encode(prompt), 6) for prompt in prompts]
    scores = [ScoreRequest(encode(prompt), encode("ab")) for prompt in prompts]
    check_forms_agree(engine, [random_z(engine, 1, 0.2), None], [0, 1], generates, scores)


@pytest.mark.parametrize("factors", [True, False])
def test_gradients_are_summed_over_the_layers_that_share_a_weight(engine: TransformersEngine, factors: bool) -> None:
    tokens = torch.tensor([encode("the stop 12 ab")])
    z = {name: vector.requires_grad_() for name, vector in random_z(engine, 3, 0.1).items()}
    engine.release()
    engine.forms.factors = factors
    # Gradient checkpointing computes every layer again, in the same form.
    with engine.trained(z), checkpointed(engine.model, engine.trained_targets(z)):
        value = torch.log_softmax(engine.model(tokens, use_cache=False).logits[0, -1], -1)[7]
        found = torch.autograd.grad(value, list(z.values()))
    for name in [name for name, target in engine.targets.items() if target.aliases][:3]:
        step = torch.zeros_like(z[name])
        step[0] = 1e-2
        moved = []
        for sign in (1, -1):
            near = {n: v.detach() + (sign * step if n == name else 0) for n, v in z.items()}
            with torch.no_grad(), engine.applied(near):
                moved.append(float(torch.log_softmax(engine.model(tokens).logits[0, -1].double(), -1)[7]))
        slope = (moved[0] - moved[1]) / 2e-2
        own = float(found[list(z).index(name)][0])
        assert own == pytest.approx(slope, rel=0.05, abs=2e-3), name


def test_a_weight_may_be_named_by_any_of_its_names(engine: TransformersEngine) -> None:
    tokens = encode("the stop 12 ab")
    name, target = next((n, t) for n, t in engine.targets.items() if t.aliases)
    vector = random_z(engine, 1)[name]
    with engine.applied({name: vector}):
        expected = logits(engine, tokens)
    for z in ({target.aliases[-1]: vector}, {name: vector, target.aliases[0]: vector.clone()}):
        with engine.applied(z):
            assert torch.equal(logits(engine, tokens), expected)
        with engine.activation([z]):
            assert torch.allclose(logits(engine, tokens), expected, atol=1e-3)
        with engine.trained(z):
            assert torch.allclose(logits(engine, tokens), expected, atol=1e-3)
        assert engine.bases(z).keys() == z.keys()
        assert engine.trained_targets(z).keys() == {name}
    odd = {name: vector, target.aliases[0]: vector + 1}
    for context in (engine.applied, lambda z: engine.activation([z]), engine.trained):
        with (
            pytest.raises(ExpertMismatchError, match=r"has different vectors for .* which are one weight"),
            context(odd),
        ):
            pass


def renamed(expert: Expert, z: Z, **base: Any) -> Expert:
    own = expert.manifest
    manifest = own.model_copy(
        update={"targets": {n: len(v) for n, v in z.items()}, "base": own.base.model_copy(update=base)}
    )
    return replace(expert, z=z, manifest=manifest)


def test_an_expert_that_names_a_weight_otherwise_is_taken_under_its_first_name(engine: TransformersEngine) -> None:
    z = random_z(engine, 1)
    expert = expert_of(engine, "mine", z)
    by_alias = {(engine.targets[n].aliases or (n,))[-1]: v for n, v in z.items()}
    by_all = {other: v for n, v in z.items() for other in (n, *engine.targets[n].aliases)}
    odd = {n: torch.full_like(v, 2.0) if n == next(iter(engine.ranks().aliases)) else v for n, v in by_all.items()}
    for named in (by_alias, by_all):
        # An untied copy of the model has the same numbers and a matrix for each name.
        for own in (engine.base.fingerprint, engine.ranks().untied):
            given = renamed(expert, named, fingerprint=own)
            check_expert(given, engine.base, engine.ranks())
            for transfer in ("none", "strict", "resample"):
                fitted = fit_expert(given, transfer, engine.base, engine.ranks())
                assert fitted.z.keys() == z.keys()
                assert all(torch.equal(fitted.z[n], z[n]) for n in z)
                assert fitted.transferred is None
    with pytest.raises(ExpertMismatchError, match=r"expert mine has different vectors for .* which are one weight"):
        fit_expert(renamed(expert, odd), "none", engine.base, engine.ranks())
    with pytest.raises(ExpertMismatchError, match="was trained on other weights"):
        fit_expert(renamed(expert, by_alias, fingerprint="ab" * 32), "none", engine.base, engine.ranks())


def test_an_expert_of_shared_weights_does_not_fit_a_copy_that_shares_none() -> None:
    tied = TransformersEngine(of_one_parameter(), make_tokenizer(), "tied")
    untied = TransformersEngine(untie(of_one_parameter()), make_tokenizer(), "untied")
    assert untied.ranks().untied == untied.base.fingerprint == tied.ranks().untied
    assert not untied.ranks().aliases
    with pytest.raises(ExpertMismatchError, match="was trained on other weights"):
        fit_expert(expert_of(tied, "mine", random_z(tied, 1)), "none", untied.base, untied.ranks())


def untie(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())
    return model


def test_nothing_changes_for_a_model_that_shares_nothing() -> None:
    digests = {"model.layers.0.mlp.up_proj.weight": "ab", "model.layers.1.mlp.up_proj.weight": "cd"}
    assert fingerprint(digests) == fingerprint(digests, {})
    assert fingerprint(digests) != fingerprint(digests, {"model.layers.2.mlp.up_proj.weight": next(iter(digests))})


@pytest.mark.parametrize("holder", ["embed_tokens", "lm_head"])
def test_a_weight_that_the_embedding_or_head_holds_too_is_left_out(
    holder: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = families.make_model("llama", len(make_tokenizer()), intermediate_size=len(make_tokenizer()))
    before = set(find_targets(model))
    held = model.model.embed_tokens if holder == "embed_tokens" else model.lm_head
    model.model.layers[1].mlp.up_proj.weight = held.weight
    with caplog.at_level(logging.WARNING):
        engine = TransformersEngine(model, make_tokenizer(), "tiny")
    assert before - set(engine.targets) == {UP.format(1)}
    assert "tiny: these weights of its decoder layers are not adapted: 1 × mlp.up_proj" in caplog.text
    z, tokens = random_z(engine, 1), encode("the end")
    base = logits(engine, tokens)
    with engine.applied(z):
        by_weight = logits(engine, tokens)
    with engine.activation([z]):
        assert torch.allclose(logits(engine, tokens), by_weight, atol=1e-3)
    assert torch.equal(logits(engine, tokens), base)


def test_layers_are_those_of_a_models_every_use() -> None:
    found = find_targets(zamba2())
    assert {name for name in choose(found, "attn", [1]) if "q_proj" in name} == {ZAMBA2.format(1)}
    assert not [name for name in choose(found, "all", [5]) if "shared_transformer.self_attn.q_proj" in name]


def make_engine(model: Any) -> TransformersEngine:
    return TransformersEngine(model, make_tokenizer(), "tiny")


@pytest.mark.parametrize("name", ["zamba2", "one parameter", "one module", "views"])
def test_a_merged_checkpoint_computes_what_the_engine_computes(name: str, tmp_path: Path) -> None:
    engine = make_engine(MODELS[name]())
    z, tokens = random_z(engine, 1, 0.2), encode("the stop 12 ab")
    write_merged(engine, engine.tokenizer, z, tmp_path / "merged", {})
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad(), engine.applied(z):
        assert torch.equal(plain(torch.tensor([tokens])).logits[0], logits(engine, tokens))
    found = extract(engine, plain.state_dict(), "merged")
    assert found.z.keys() == z.keys()
    assert all(torch.allclose(found.z[n], z[n], atol=1e-2) for n in z)
    if name != "zamba2":
        other = {n: v.clone() for n, v in plain.state_dict().items()}
        alias = next(iter(engine.ranks().aliases))
        other[alias] += 1
        with pytest.raises(ExpertMismatchError, match=f"and {alias} differ, but they are one weight in tiny"):
            extract(engine, other, "merged")


def test_a_checkpoint_is_read_by_whichever_names_it_has(tmp_path: Path) -> None:
    model = zamba2()
    engine = make_engine(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = safetensors.torch.load(path.read_bytes())
    first, alias = ZAMBA2.format(1), ZAMBA2.format(4)
    assert first in stored
    assert alias not in stored

    def write(**tensors: torch.Tensor | None) -> tuple[Any, TransformersEngine]:
        content = {**stored, **tensors}
        safetensors.torch.save_file({n: v for n, v in content.items() if v is not None}, path, {"format": "pt"})
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        return open_checkpoint(str(tmp_path)), make_engine(loaded)

    one = stored[first]
    for tensors in ({}, {alias: one.clone()}, {first: None, alias: one.clone()}):
        read, loaded = write(**tensors)
        assert read.fingerprint() == loaded.base.fingerprint == engine.base.fingerprint
        assert list(read.targets) == list(engine.targets)
        assert torch.equal(read.matrix(first), one)
        assert set(read.keys(first)) == {n for n in (first, alias) if {**stored, **tensors}.get(n) is not None}
    # transformers does not tie weights that differ.
    read, loaded = write(**{alias: one + 1})
    assert list(read.targets) == list(loaded.targets)
    assert read.fingerprint() == loaded.base.fingerprint != engine.base.fingerprint
    assert torch.equal(read.matrix(alias), one + 1)


def test_an_adapter_of_peft_goes_into_every_layer_that_shares_a_weight() -> None:
    model = of_one_parameter()
    with torch.no_grad():
        before = model.eval()(torch.tensor([encode("the end")])).logits
    adapter = PeftForm("lora", rank=2)
    engine = PeftEngine(model, make_tokenizer(), "tiny", adapter=adapter, matrices=[UP.format(0)])
    z = engine.parameters()
    assert {name.split(".lora_")[0].split("model.layers.")[1] for name in z} == {"0.mlp.up_proj", "1.mlp.up_proj"}
    with torch.no_grad(), engine.applied({name: torch.ones_like(value) for name, value in z.items()}):
        assert not torch.allclose(model(torch.tensor([encode("the end")])).logits, before, atol=0.1)
    engine.close()
    assert torch.equal(logits(engine, encode("the end")), before[0])


def test_vllm_loads_every_copy_of_a_shared_weight(tmp_path: Path, bases_folder: Path) -> None:
    engine = make_engine(of_one_parameter())
    name, alias, z = UP.format(0), UP.format(1), random_z(engine, 1)
    engine.bases([name])
    w = engine.targets[name].matrix
    safetensors.torch.save_file({name: w.clone(), alias: w.clone()}, tmp_path / "model.safetensors")
    place = Place([name, alias], engine.forms._digests[name], engine.ranks()[name], False)
    files = dict.fromkeys((name, alias), str(tmp_path / "model.safetensors"))
    plan = Plan.parse(Plan({name: place}, files, str(bases_folder)).text())
    changed = dict(Weights(plan, {}, torch.float32, torch.device("cpu")).change({name: z[name]}))
    with engine.applied({name: z[name]}):
        assert torch.equal(changed[name], engine.targets[name].matrix)
    assert torch.equal(changed[alias], changed[name])


def test_a_public_checkpoint_numbers_every_name_of_a_shared_weight(tmp_path: Path) -> None:
    engine = make_engine(of_one_parameter())
    names = public_targets(engine)
    assert names == [n for n in engine.model.state_dict() if "mlp" in n and n.endswith("weight")]
    generator = torch.Generator().manual_seed(0)
    ranks, aliases = engine.ranks(), engine.ranks().aliases
    drawn = {n: torch.randn(ranks[aliases.get(n, n)], generator=generator) for n in names}
    agreeing = {n: drawn[aliases.get(n, n)] for n in names}
    for params, message in ((agreeing, None), (drawn, "has different vectors for")):
        content = {f"learnable_params_module_list.{i}": p for i, p in enumerate(params.values())}
        torch.save(content, tmp_path / "policy_params.pt")
        checkpoint = read_public(tmp_path / "policy_params.pt")
        if message is None:
            assert list(import_public(checkpoint, engine)) == [n for n in names if n not in aliases]
        else:
            with pytest.raises(ExpertMismatchError, match=message):
                import_public(checkpoint, engine)
