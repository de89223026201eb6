"""The gradient of z: against differences in float64, against the plain formula, and in a bfloat16 model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from t2.adapters.engine.checkpointing import checkpointed
from t2.adapters.engine.gradients import shifted, spectral
from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ModelError
from tests.adapters.conftest import ARCHITECTURES, make_model, make_tokenizer, random_z

TOKENS = torch.tensor([[5, 9, 14, 30, 22, 6], [40, 8, 8, 17, 3, 12]])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 5)])
def test_the_activation_form_has_the_gradient_of_differences(rows: int, shape: tuple[int, ...]) -> None:
    q, bias = torch.linalg.qr(drawn(5, 5))[0][:, :4], drawn(5)
    y, shift = drawn(*shape).requires_grad_(), drawn(rows, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, shift: shifted(y, shift, q, bias), (y, shift))
    by_row = y.reshape(rows, -1, 5) - bias
    expected = y + (((by_row @ q) * shift.unsqueeze(1)) @ q.T).reshape(shape)
    torch.testing.assert_close(shifted(y, shift, q, bias), expected)


def test_the_spectral_factors_have_the_gradient_of_differences() -> None:
    x, shift = drawn(2, 3, 6).requires_grad_(), drawn(4).requires_grad_()
    down, up, bias = drawn(4, 6), drawn(5, 4), drawn(5)
    assert torch.autograd.gradcheck(lambda x, shift: spectral(x, shift, down, up, bias), (x, shift))
    torch.testing.assert_close(spectral(x, shift, down, up, bias), ((x @ down.T) * (1 + shift)) @ up.T + bias)


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(1))
    return (logits.float().log_softmax(-1) * weights).mean()


def composed(engine: TransformersEngine, z: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The gradient through dense weights W′(z), by autograd's own formulas."""
    leaves = {name: vector.clone().requires_grad_() for name, vector in z.items()}
    parameters = {}
    for name, basis in engine.bases(z).items():
        target = engine.targets[name]
        w, q = target.matrix.float(), basis.q
        m = (q * (leaves[name] - 1)) @ q.T
        moved = (w + (m @ w if basis.side == "out" else w @ m)).to(target.parameter.dtype)
        parameters[name] = moved.T if target.transposed else moved
    loss_of(torch.func.functional_call(engine.model, parameters, (TOKENS,)).logits).backward()
    return flat(leaves)


def formed(
    engine: TransformersEngine,
    z: Mapping[str, torch.Tensor],
    form: str,
    rank: int | None = None,
    checkpointing: bool = False,
) -> torch.Tensor:
    """The gradient in a form of the engine's."""
    leaves = {name: vector.clone().requires_grad_() for name, vector in z.items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(engine.activation([leaves]) if form == "activation" else engine.trained(leaves, rank))
        if checkpointing:
            stack.enter_context(checkpointed(engine.model, {name: engine.targets[name] for name in z}))
        loss_of(engine.model(TOKENS).logits).backward()
    assert all("forward" not in module.__dict__ for module in engine.model.modules())
    return flat(leaves)


def flat(z: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.zeros_like(v) if v.grad is None else v.grad for v in z.values()])


@pytest.mark.parametrize("form", ["activation", "trained"])
def test_the_forms_have_the_gradient_of_dense_weights(form: str, engine: TransformersEngine) -> None:
    z = random_z(engine, 4, 0.2)
    torch.testing.assert_close(formed(engine, z, form), composed(engine, z), atol=1e-5, rtol=1e-3)


def test_few_moving_components_have_the_same_gradient(engine: TransformersEngine) -> None:
    z = {
        name: torch.cat([vector[:3], torch.ones(len(vector) - 3)]) for name, vector in random_z(engine, 4, 0.2).items()
    }
    moving = torch.cat([torch.arange(len(vector)) < 3 for vector in z.values()])
    found, whole = formed(engine, z, "trained", 3), formed(engine, z, "trained")
    torch.testing.assert_close(found[moving], whole[moving], atol=1e-5, rtol=1e-3)
    assert not bool(found[~moving].any())


def test_without_memory_for_the_factors_hooks_give_the_same_gradient(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = random_z(engine, 4, 0.2)
    expected = formed(engine, z, "trained")
    assert engine.forms.kept_bytes > 0
    engine.forms.release()
    assert engine.forms.kept_bytes == 0
    monkeypatch.setattr("t2.adapters.engine.forms.free_bytes", lambda device: 1000)
    with pytest.raises(
        ModelError, match=r"factors of the weights in memory, which take 0\.00 GB, and 0\.00 GB are free"
    ):
        formed(engine, z, "trained")
    engine.forms.factors = None
    by_hooks = formed(engine, z, "trained")
    torch.testing.assert_close(by_hooks, expected, atol=1e-5, rtol=1e-3)
    assert engine.forms.kept_bytes == 0
    # What was found at first stays.
    monkeypatch.undo()
    assert torch.equal(formed(engine, z, "trained"), by_hooks)
    assert engine.forms.kept_bytes == 0
    engine.forms.factors = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["activation", "trained"])
def test_checkpointing_gives_the_same_gradient_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    for architecture in ARCHITECTURES:
        engine = TransformersEngine(make_model(architecture, dtype=dtype), make_tokenizer(), "tiny")
        z = random_z(engine, 2, 0.2)
        layer = next(m for name, m in engine.model.named_modules() if name.endswith(".0"))
        calls: list[nn.Module] = []
        next(layer.children()).register_forward_pre_hook(lambda module, _, calls=calls: calls.append(module))
        assert torch.equal(formed(engine, z, form, checkpointing=True), formed(engine, z, form))
        assert len(calls) == 3, "twice with checkpointing and once without"


def test_a_bfloat16_model_keeps_the_digits_of_z_and_of_its_gradient() -> None:
    """z moves by less than bfloat16 can tell near 1, and the gradient of many tokens is summed in float32."""
    engine = TransformersEngine(make_model("llama", dtype=torch.bfloat16), make_tokenizer(), "tiny")
    exact = TransformersEngine(make_model("llama"), make_tokenizer(), "tiny")
    exact.model.load_state_dict(engine.model.state_dict())
    z = random_z(engine, 6, 1e-3)
    expected = composed(exact, z)
    for form in ("activation", "trained"):
        found = formed(engine, z, form)
        assert found.dtype == torch.float32
        assert float(torch.cosine_similarity(found, expected, dim=0)) > 0.999
    p, h = (torch.randn(1, 4096, 2, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    shift = torch.zeros(1, 2, requires_grad=True)
    shifted(p, shift, torch.eye(2, dtype=torch.bfloat16), None).backward(h)
    assert shift.grad is not None
    torch.testing.assert_close(shift.grad, (p.float() * h.float()).sum(dim=1), atol=1e-3, rtol=1e-5)
