"""``adapt=peft``: adapters that PEFT wrote answer as they do in lm-eval's own ``hf``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from t2.adapters.peft_folder import put_in, read_folder
from t2.core.digests import sha256_file
from t2.core.errors import ArgumentError, ExpertError, ExpertFileError, ExpertMismatchError, T2Error
from t2.harness.answers import Answers
from t2.harness.args import parse_args
from t2.harness.model import T2LM
from t2.harness.opened import open_model
from tests.harness import tiny
from tests.harness.pefts import CONFIGS, save_adapter

NAMES = ("tiny_choice", "tiny_text")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "lora", tiny_folder)


def make(folder: Path, adapter: Path, **args: Any) -> T2LM:
    given = {"pretrained": str(folder), "adapt": "peft", "peft": str(adapter), **args}
    return T2LM.create_from_arg_obj(given, {"device": "cpu", "batch_size": 3})


def tasks() -> list[Any]:
    return [tiny.choice_task(), tiny.text_task()]


@pytest.mark.parametrize("method", list(CONFIGS))
def test_it_equals_hf_with_peft_sample_for_sample(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / method, tiny_folder, method)
    args = f"pretrained={tiny_folder},device=cpu,peft={adapter}"
    hf = tiny.evaluate("hf", tasks(), model_args=args, batch_size=3)
    own = tiny.evaluate(make(tiny_folder, adapter), tasks())
    base = tiny.evaluate("hf", tasks(), model_args=f"pretrained={tiny_folder},device=cpu", batch_size=3)
    for name in NAMES:
        assert tiny.answers(own, name) == tiny.answers(hf, name)
        assert tiny.answers(own, name) != tiny.answers(base, name)
    assert own["results"] == hf["results"]


def test_a_vocabulary_larger_than_the_tokenizers_is_cut_as_hf_does(tmp_path: Path, tiny_folder: Path) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tiny.tokenizer()) + 8)
    model.save_pretrained(tmp_path / "padded")
    tiny.tokenizer().save_pretrained(tmp_path / "padded")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "padded")
    args = f"pretrained={tmp_path / 'padded'},device=cpu,peft={adapter}"
    hf = tiny.evaluate("hf", tasks(), model_args=args, batch_size=3)
    own = tiny.evaluate(make(tmp_path / "padded", adapter), tasks())
    assert [tiny.answers(own, name) for name in NAMES] == [tiny.answers(hf, name) for name in NAMES]


@pytest.mark.parametrize("method", list(CONFIGS))
def test_its_numbers_are_those_that_peft_trains(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / method, tiny_folder, method, trained=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    trained, _ = peft.get_peft_model(model, CONFIGS[method]()).get_nb_trainable_parameters()
    assert read_folder(adapter).numbers == trained


def test_embeddings_beside_it_are_the_bases(tiny_folder: Path, lora: Path, tmp_path: Path) -> None:
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), str(lora)
    )
    adapted.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=True)
    assert (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size > 1.5 * (
        lora / "adapter_model.safetensors"
    ).stat().st_size
    assert read_folder(tmp_path / "lora").numbers == read_folder(lora).numbers


def tensors(model: torch.nn.Module) -> dict[str, Any]:
    """All parameters, by name: where they are, what they are and what they hold."""
    return {
        name: (parameter.data_ptr(), type(parameter), parameter.requires_grad, parameter.clone())
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize("method", [*CONFIGS, "padded"])
def test_a_shared_model_answers_with_it_and_is_afterwards_what_it_was(method: str, tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    if method == "padded":
        # Its embeddings are cut while the adapter is in.
        grown = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        grown.resize_token_embeddings(len(tiny.tokenizer()) + 8)
        grown.save_pretrained(base)
    adapter = save_adapter(tmp_path / method, base, "lora" if method == "padded" else method)
    alone = tiny.evaluate(make(base, adapter), tasks())
    opened = open_model(parse_args({"pretrained": str(base), "device": "cpu", "batch_size": 3}), Answers())
    plain = {"pretrained": str(base), "device": "cpu", "batch_size": 3}
    before = tiny.evaluate(T2LM.sharing(opened, plain), tasks())
    modules, held = list(opened.inner.model.modules()), tensors(opened.inner.model)
    lm = T2LM.sharing(opened, {**plain, "adapt": "peft", "peft": str(adapter)})
    shared = tiny.evaluate(lm, tasks())
    assert opened.inner.peft is None
    assert list(map(id, opened.inner.model.modules())) == list(map(id, modules))
    for name, (place, kind, requires_grad, values) in tensors(opened.inner.model).items():
        assert (place, kind, requires_grad) == held[name][:3]
        assert torch.equal(values, held[name][3])
    assert opened.inner.model.config.vocab_size == opened.inner.model.get_input_embeddings().weight.shape[0]
    opened.answers = None
    after = tiny.evaluate(T2LM.sharing(opened, plain), tasks())
    for name in NAMES:
        assert tiny.answers(shared, name) == tiny.answers(alone, name)
        assert tiny.answers(after, name) == tiny.answers(before, name) != tiny.answers(shared, name)


def test_one_that_writes_over_weights_of_the_base_cannot_share_it(
    lora: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writing_over(model: Any, *args: Any) -> Any:
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        return put_in(model, *args)

    monkeypatch.setattr("t2.harness.peft_adapter.put_in", writing_over)
    plain = {"pretrained": str(tiny_folder), "device": "cpu"}
    opened = open_model(parse_args(plain))
    with pytest.raises(ExpertError, match="writes over weights of the base") as told:
        T2LM.sharing(opened, {**plain, "adapt": "peft", "peft": str(lora)})
    assert "\n" not in str(told.value)


def test_the_record_names_the_adapter_by_its_digest(lora: Path, tiny_folder: Path, tmp_path: Path) -> None:
    lm = make(tiny_folder, lora, record=str(tmp_path / "record.json"))
    tiny.evaluate(lm, [tiny.choice_task()])
    (record,) = json.loads((tmp_path / "record.json").read_bytes())
    assert record["strategy"] == "peft"
    assert [(ref["name"], ref["digest"]) for ref in record["experts"]] == [
        ("lora", sha256_file(lora / "adapter_model.safetensors"))
    ]
    assert record["settings"]["peft"] == {"type": "LORA", "config": sha256_file(lora / "adapter_config.json")}
    assert record["mixtures"] == [{"alpha": {"lora": 1.0}, "requests": 48}]
    base = T2LM.create_from_arg_obj({"pretrained": str(tiny_folder)}, {"device": "cpu"})
    assert record["base"]["fingerprint"] == base.base.fingerprint
    assert lm.identity()["digest"] != base.identity()["digest"]
    # The same weights under another alpha are another adapter.
    stronger = shutil.copytree(lora, tmp_path / "lora")
    config = json.loads((stronger / "adapter_config.json").read_text())
    (stronger / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    assert make(tiny_folder, stronger).identity()["digest"] != lm.identity()["digest"]


def empty(folder: Path, lora: Path) -> Path:
    folder.mkdir()
    return folder


def pickled(folder: Path, lora: Path) -> Path:
    shutil.copytree(lora, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


def cut(folder: Path, lora: Path) -> Path:
    shutil.copytree(lora, folder)
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-40])
    return folder


def deeper(folder: Path, lora: Path) -> Path:
    return save_adapter(folder, tiny.save_model(folder.with_name("deeper"), layers=3))


def shallower(folder: Path, lora: Path) -> Path:
    return save_adapter(folder, tiny.save_model(folder.with_name("shallower"), layers=1))


def wider(folder: Path, lora: Path) -> Path:
    return save_adapter(folder, tiny.save_model(folder.with_name("wider"), hidden=48))


def elsewhere(folder: Path, lora: Path) -> Path:
    shutil.copytree(lora, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["c_attn"]}))
    return folder


def untrained(folder: Path, lora: Path) -> Path:
    return save_adapter(folder, folder.parent / "tiny", trained=False)


@pytest.mark.parametrize(
    ("spoil", "error", "line"),
    [
        (lambda folder, lora: folder, ArgumentError, "does not exist here; name a folder that PEFT's save_pretrained"),
        (empty, ArgumentError, "has no adapter_config.json; name a folder"),
        (pickled, ExpertFileError, "adapter_model.bin is a pickle, which t2 does not load; save the adapter with"),
        (cut, ExpertFileError, "cannot be read (SafetensorError"),
        (deeper, ExpertMismatchError, "was made for another model than tiny: base_model.model.model.layers.2."),
        (shallower, ExpertMismatchError, "was made for another model than tiny: base_model.model.model.layers.1."),
        (wider, ExpertMismatchError, "does not fit tiny (RuntimeError: "),
        (elsewhere, ExpertMismatchError, "does not fit tiny ("),
        (untrained, ExpertError, "leaves the logits of a probe text unchanged: it was not trained"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_adapter_that_cannot_be_used_is_told_in_one_line(
    spoil: Any, error: type[T2Error], line: str, lora: Path, tmp_path: Path
) -> None:
    base = tiny.save_model(tmp_path / "tiny")
    with pytest.raises(error) as caught:
        make(base, spoil(tmp_path / "odd", lora))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_on_a_base_with_tied_embeddings_it_answers_as_peft_does(saved: str, tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    config = transformers.AutoConfig.from_pretrained(base, tie_word_embeddings=True)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    own: Any = make(base, tmp_path / "adapter").inner.model
    ids = torch.tensor([[5, 40, 56, 20]])
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(input_ids=ids).logits
        assert torch.equal(own(input_ids=ids).logits, expected)
