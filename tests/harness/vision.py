"""A tiny random model of the LLaVA kind, and the text model that is its language half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.harness import tiny

SIDE, PATCH = 8, 4


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tiny tokenizer and a token for a place in a picture."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def text_config() -> transformers.LlamaConfig:
    """Of both text model and language half."""
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def save_models(folder: Path) -> tuple[Path, Path]:
    """Save a text model, and one that sees with the same language weights; their folders."""
    torch.manual_seed(0)
    text = transformers.LlamaForCausalLM(text_config())
    words = tokenizer()
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=16,
    )
    place: Any = words.convert_tokens_to_ids("<image>")
    make_config: Any = transformers.LlavaConfig
    config = make_config(vision_config=vision, text_config=text_config(), image_token_index=place, pad_token_id=0)
    seeing = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in seeing.named_parameters():
            if "language_model" not in name and parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    seeing.model.language_model.load_state_dict(text.model.state_dict())
    seeing.lm_head.load_state_dict(text.lm_head.state_dict())
    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}<{{ m['role'] }}>{% for c in m['content'] %}"
            "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}</>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        ),
    )
    text.save_pretrained(folder / "text")
    words.save_pretrained(folder / "text")
    seeing.save_pretrained(folder / "seeing")
    processor.save_pretrained(folder / "seeing")
    return folder / "text", folder / "seeing"
