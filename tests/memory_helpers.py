"""A large model's config, for plans that load no weights."""

from transformers import LlamaConfig


def llama_7b(**sizes):
    """The sizes of Llama 2 7B, but for those that are given."""
    llama = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaConfig(**{**llama, **sizes})
