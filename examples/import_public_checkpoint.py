"""Import a checkpoint of Transformer²'s public code; one is made here, as that code would save it."""

import tempfile
from pathlib import Path

import torch

from t2.api import load_model

model = load_model(dtype="bfloat16")
folder = Path(tempfile.mkdtemp(prefix="t2-example-"))

# The public code numbers the vectors of all matrices with "mlp" in their name; z = sigmoid(p) in bfloat16.
generator = torch.Generator().manual_seed(0)
matrices = [name for name in model.engine.targets if "mlp" in name]
ranks = [model.engine.ranks()[name] for name in matrices]
params = {
    f"learnable_params_module_list.{i}": (0.1 + 0.2 * torch.randn(rank, generator=generator)).bfloat16()
    for i, rank in enumerate(ranks)
}
torch.save(params, folder / "policy_params.pt")

saved = model.import_public(folder / "policy_params.pt", "theirs", domain="math", folder=folder)
print("expert:", saved.path)
print("note:", saved.note)

# The effective z keeps the nuclear norm of every matrix: Σ(σ⊙z) = Σσ.
adapted = model.adapt(experts=saved.path)
z = adapted.experts[0].z[matrices[0]]
sigma = model.engine.bases([matrices[0]])[matrices[0]].sigma
print(f"nuclear norm: {float(sigma.sum()):.3f} before, {float((sigma * z).sum()):.3f} after")
print("written:", adapted.generate("The capital of France is", max_new_tokens=8))
