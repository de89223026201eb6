"""Adapters of the tiny model as PEFT itself makes and writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "pissa": lambda: peft.LoraConfig(
        r=4, init_lora_weights="pissa", target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    # A and Q, which occur in prompts but not in the probe text.
    "tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[40, 56], target_modules=["embed_tokens"], init_weights=False, task_type="CAUSAL_LM"
    ),
    "lora_tokens": lambda: peft.LoraConfig(
        r=4,
        target_modules=TARGETS,
        trainable_token_indices={"embed_tokens": [40, 56]},
        task_type="CAUSAL_LM",
    ),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def save_adapter(folder: Path, base: Path, method: str = "lora", trained: bool = True) -> Path:
    """An adapter after a few steps of PEFT's own training on random tokens."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, CONFIGS[method]())
    if trained:
        leaves = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(leaves, lr=0.05)
        tokens = torch.randint(4, 90, (4, 24))
        for _ in range(4):
            optimizer.zero_grad()
            adapted(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    adapted.save_pretrained(folder)
    return folder
