"""Adapt the demo model to a few labelled examples and to prompts, ask it, and read what was done."""

from t2.api import load_model

model = load_model(dtype="bfloat16")
print(model)
print("experts:", ", ".join(model.experts()))

# (prompt, choices, index of the right one); the model is asked which choice is likeliest.
examples = [
    ("Question: What do plants make from sunlight?\nAnswer:", ["sugar", "iron", "salt", "sand"], 0),
    ("Question: Which of these is a mammal?\nAnswer:", ["a trout", "a whale", "a frog", "a hen"], 1),
    ("Question: What pulls a falling apple down?\nAnswer:", ["wind", "heat", "gravity", "light"], 2),
    ("Question: Which planet is closest to the Sun?\nAnswer:", ["Mars", "Venus", "Earth", "Mercury"], 3),
    ("Question: What does ice become when it melts?\nAnswer:", ["steam", "water", "snow", "glass"], 1),
    ("Question: Which organ pumps blood?\nAnswer:", ["the heart", "the lung", "the skin", "the liver"], 0),
]
adapted = model.adapt(examples=examples, population=5, generations=2, normalise="sum")

record = adapted.record
assert record.held_out is not None
print("mixture:", adapted.alpha() or "the base")
print(f"accuracy on the examples: {record.held_out.before:.2f} → {record.held_out.after:.2f}")
print("why:", record.note)

question = "Question: What gas do we breathe in to live?\nAnswer:"
choices = ["oxygen", "helium", "smoke"]
scores = adapted.loglikelihoods(question, choices)
print("likeliest:", choices[scores.index(max(scores))])
print("written:", adapted.generate("Why is the sky blue?", chat=True, max_new_tokens=16))

# Without labels: each prompt goes to the expert of the domain that the model names for it.
prompts = [
    "Tom has 3 boxes of 12 pencils and gives away 7 pencils. How many pencils are left?",
    "Which of these is the best conductor of electricity: copper, wood, glass or rubber?",
]
dispatched = model.adapt("prompt", prompts=prompts)
print("prompts by domain:", dispatched.record.dispatch)
for prompt, answer in zip(prompts, dispatched.generate(prompts, chat=True, max_new_tokens=16), strict=True):
    print(f"{prompt}\n  mixture: {dispatched.alpha(prompt) or 'the base'}\n  answer: {answer!r}")
