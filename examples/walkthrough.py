# %% [markdown]
# # From a model to a smaller one, step by step
# The bundled model (4 layers of 32 experts, 8 MB) and text that this notebook writes itself.
# Convert it with `jupytext --to notebook walkthrough.py`, or run it as a program.

# %%
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reap_driver as rd

MODEL = Path(rd.__file__).parent / "demo" / "model"
OUT = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

# %% [markdown]
# ## Observe
# Any forward pass inside `rd.observe` is observed. The model computes what it always computes.

# %%
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = rd.load_model(MODEL)
functions = [f"def add_{i}(first, second):\n    return first + second + {i}\n" for i in range(16)]
records = [json.dumps({"name": f"item {i}", "price": i, "tags": ["new"]}) for i in range(16)]
groups = {"code": functions, "json": records}

with rd.observe(model) as observer:
    for name, texts in groups.items():
        with observer.group(name):
            for text in texts:
                observer(**tokenizer(text, return_tensors="pt"))
stats = observer.stats
print({name: int(layer.tokens.sum()) for name, layer in stats.layers.items()})

# %% [markdown]
# ## Rank
# One score for each expert of each layer; the lowest are removed first.

# %%
scores = rd.score(stats, "reap")
for name, values in scores.items():
    print(name, "most important:", values.argsort(descending=True)[:5].tolist())

# %% [markdown]
# ## Plan
# Half of the experts of every layer. Weights of the groups change the mix without observing again.

# %%
plan = rd.make_plan(scores, ratio=0.5)
for_code = rd.make_plan(rd.score(stats, "reap", weights={"code": 0.9, "json": 0.1}), ratio=0.5)
for name, kept in plan.kept.items():
    print(
        name, "keeps", len(kept), "; another mix shares", len(set(kept) & set(for_code.kept[name]))
    )

# %% [markdown]
# ## Try it
# The model's own routers choose among the kept experts only.

# %%
ids = tokenizer("def add(first, second):\n    return first +", return_tensors="pt")["input_ids"]
with torch.no_grad():
    whole = model(ids).logits.argmax(-1)
    with rd.masked_experts(model, plan.kept):
        masked = model(ids).logits.argmax(-1)
print(f"equal most likely tokens: {float((whole == masked).float().mean()):.0%}")

# %% [markdown]
# ## Write it
# The result is an ordinary checkpoint, and computes what the masked model computed.

# %%
rd.apply_plan(MODEL, plan, OUT / "model-half")
half = AutoModelForCausalLM.from_pretrained(OUT / "model-half")
with torch.no_grad():
    written = half(ids).logits.argmax(-1)
assert bool((written == masked).all())
print(f"{half.num_parameters() / model.num_parameters():.0%} of the parameters are left")
