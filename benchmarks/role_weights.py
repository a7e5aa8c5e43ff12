"""Weights of four roles on one base over the base alone, by the dry run's arithmetic, for architectures of many sizes.

    python -m benchmarks.role_weights
    python -m benchmarks.role_weights --rank 16 --targets all-linear

Policy, reference, reward model and critic each have a LoRA adapter in float32, the last two a scalar head. The base is
in float32, in bf16, or in 4 bits (nf4, double quantisation) with the embeddings and the LM head in bf16. Nothing is
loaded: parameters are counted on the meta device. Sizes are those of the models' published configs.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig
from transformers import LlamaConfig

from benchmarks.common import table
from instruct_trl.memory.plan import PPOModels, ppo_roles
from instruct_trl.memory.roles import total

# hidden, intermediate, layers, heads, heads with keys of their own, head size, vocabulary, embeddings tied to the head
SIZES = {
    "SmolLM2 135M": (576, 1536, 30, 9, 3, 64, 49152, True),
    "SmolLM2 360M": (960, 2560, 32, 15, 5, 64, 49152, True),
    "TinyLlama 1.1B": (2048, 5632, 22, 32, 4, 64, 32000, False),
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "SmolLM2 1.7B": (2048, 8192, 24, 32, 32, 64, 49152, True),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "Llama 2 7B": (4096, 11008, 32, 32, 32, 128, 32000, False),
    "Llama 3 8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
}
BASES = {"float32": (torch.float32, None), "bf16": (torch.bfloat16, None), "4-bit": (torch.bfloat16, True)}
MB = 1e6


def config_of(name: str) -> LlamaConfig:
    """The Llama config of these sizes."""
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied = SIZES[name]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16, help="of every adapter (default: 16)")
    parser.add_argument("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    args = parser.parse_args()
    targets = "all-linear" if args.targets == ["all-linear"] else args.targets
    lora = LoraConfig(task_type="CAUSAL_LM", r=args.rank, target_modules=targets)
    rows = []
    for name in SIZES:
        config, row = config_of(name), []
        for dtype, nf4 in BASES.values():
            models = PPOModels(config, config, "one_base", dtype=dtype, nf4=nf4, peft_config=lora)
            items = [item for role in ppo_roles(models).values() for item in role.resident()]
            base, adapters = (total(items, kinds=[kind]) for kind in ("weights", "adapters"))
            row += [f"{base / MB:,.0f}", f"{1 + adapters / base:.3f}"]
        rows.append([name, f"{adapters / MB:.1f}", *row])
    header = [part for kind in BASES for part in (f"base, {kind}", "four roles over it")]
    print(f"LoRA rank {args.rank} on {', '.join(args.targets)}. Megabytes (10^6 bytes).\n")
    print(table(["sizes of", "four adapters", *header], rows))


if __name__ == "__main__":
    main()
