"""Send each prompt to the expert of its domain."""

from t2.api import load_model

model = load_model(dtype="bfloat16")
prompts = [
    "Tom has 3 boxes of 12 pencils and gives away 7 pencils. How many pencils are left?",
    "Write a Python function that returns the sum of a list of numbers.",
    "Which of these is the best conductor of electricity: copper, wood, glass or rubber?",
]
adapted = model.adapt("prompt", prompts=prompts)
print("prompts by domain:", adapted.record.dispatch)
for prompt, answer in zip(prompts, adapted.generate(prompts, chat=True, max_new_tokens=24), strict=True):
    print(f"\n{prompt}\n  mixture: {adapted.alpha(prompt) or 'the base'}\n  answer: {answer!r}")
