"""A Mamba language model of transformers, on fastdiff's kernels: one line, same outputs.

    pip install 'fastdiff[bench]'
    python examples/transformers_mamba.py           # 2 small layers; a few seconds
    python examples/transformers_mamba.py 768 4     # width and layers: those of the 130m model

Weights are random here; ``MambaForCausalLM.from_pretrained(...)`` gives trained ones and changes nothing else.
"""

import sys
import time

import torch
from transformers import MambaConfig, MambaForCausalLM

from fastdiff.integrations.accelerate import accelerate, restore

width, layers = (int(value) for value in sys.argv[1:3]) if len(sys.argv) > 2 else (256, 2)
torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=1000, hidden_size=width, num_hidden_layers=layers)).eval()
tokens = torch.randint(1, 1000, (1, 512))


@torch.no_grad()
def logits_and_seconds() -> tuple[torch.Tensor, float]:
    """The model's logits, and the best time of three calls."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        logits = model(tokens, use_cache=False).logits
        times.append(time.perf_counter() - start)
    return logits, min(times)


before, slow = logits_and_seconds()
model, report = accelerate(model, return_report=True)
after, fast = logits_and_seconds()
print(report)
difference = (after - before).abs().max() / before.abs().max()
print(f"512 tokens: {1e3 * slow:.1f} ms before, {1e3 * fast:.1f} ms after: {slow / fast:.1f} times faster")
print(f"largest difference of the logits: {difference:.1e} of their range")

prompt, settings = tokens[:, :16], {"max_new_tokens": 16, "do_sample": False}
settings["attention_mask"] = torch.ones_like(prompt)
generated = model.generate(prompt, **settings)
same = torch.equal(generated, restore(model).generate(prompt, **settings))
print(f"generated text is {'the same' if same else 'DIFFERENT'}")
sys.exit(0 if same and difference < 1e-5 else 1)
