"""Text generation: transformers' own `generate()`, with the model within it compiled.

    python examples/generate.py       run it twice: the second run starts warm

The model is a Llama of four layers with random weights, so that nothing is downloaded. A static
cache keeps the calls of one kind: with one that grows, each token would be a call of another shape.
"""

from __future__ import annotations

import time

import torch
import transformers

import precast

NUM_NEW_TOKENS = 24


def make_model() -> transformers.LlamaForCausalLM:
    """Return a small language model; replace it by `AutoModelForCausalLM.from_pretrained(…)`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        max_position_embeddings=256,
    )
    return transformers.LlamaForCausalLM(config).eval()


def generate(model: transformers.LlamaForCausalLM) -> torch.Tensor:
    """Return a prompt's continuation, the most likely token at each step."""
    prompt = torch.arange(1, 33).unsqueeze(0)
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NUM_NEW_TOKENS,
        min_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile=True,  # transformers would compile the model by itself.
    )


def seconds(model: transformers.LlamaForCausalLM) -> float:
    started = time.perf_counter()
    generate(model)
    return time.perf_counter() - started


def main() -> None:
    model = make_model()
    expected = generate(model)
    eager_s = seconds(model)

    precast.compile(model)  # The same object: `generate` calls it as before.
    started = time.perf_counter()
    tokens = generate(model)
    first_s = time.perf_counter() - started
    compiled_s = min(seconds(model) for _ in range(3))

    print(f"the same tokens as eager: {torch.equal(tokens, expected)}")
    print(f"{NUM_NEW_TOKENS} tokens: eager {eager_s:.2f} s, compiled {compiled_s:.2f} s")
    status = precast.status(model)
    compile_s = sum(assembly["compile_seconds"] for assembly in status["assemblies"])
    if status["is_warm"]:
        print(f"warm: the first {NUM_NEW_TOKENS} tokens took {first_s:.2f} s, "
              f"since an earlier run spent {compile_s:.0f} s compiling")  # fmt: skip
    else:
        print(f"cold: the first {NUM_NEW_TOKENS} tokens took {first_s:.2f} s with compiling. "
              "Run it again: it is then warm.")  # fmt: skip
    for reason in status["reasons"]:
        print(f"{reason['code']}: {reason['message']}")


if __name__ == "__main__":
    main()
