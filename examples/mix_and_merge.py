"""Mix two experts, write the mixture as an expert and as an ordinary Hugging Face checkpoint, and load that plainly."""

import tempfile
from pathlib import Path

import transformers

from t2.api import load_model, mix

folder = Path(tempfile.mkdtemp(prefix="t2-example-"))
saved = mix("science-and-math", ["demo/reasoning", "demo/math"], [0.7, 0.3], folder=folder)
print("a mixture is an expert:", saved.path)

model = load_model(dtype="bfloat16")
adapted = model.adapt(experts=saved.path)
checkpoint = adapted.merge(folder / "checkpoint")
print("checkpoint:", ", ".join(sorted(path.name for path in checkpoint.iterdir())))

# From here on t2 has no part in it.
plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
prompt = "The three states of matter are"
inputs = tokenizer(prompt, return_tensors="pt")
tokens = plain.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
text = tokenizer.decode(tokens, skip_special_tokens=True)
print("the checkpoint writes:", text)
print("as t2 does:", text == adapted.generate(prompt, max_new_tokens=16))
