"""The critic's optimizer groups its parameters as the policy's does."""

import torch
from conftest import tiny_config
from ppo_helpers import make
from transformers import GPT2Config, GPT2ForSequenceClassification


def test_weights_decay_and_biases_and_norms_do_not(tmp_path, policy, scorer, tokenizer):
    llama = tiny_config()
    config = GPT2Config(
        vocab_size=llama.vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=128, num_labels=1, pad_token_id=257
    )
    trainer = make(
        tmp_path, policy, scorer, tokenizer, value_model=GPT2ForSequenceClassification(config), optim="sgd",
        weight_decay=0.5, value_learning_rate=0.1, ptx_coef=0.0,
    )  # fmt: skip
    parameters = dict(trainer.critic.unwrapped.classifier.named_parameters())
    before = {}
    for name, parameter in parameters.items():
        parameter.data.normal_()
        parameter.grad = torch.zeros_like(parameter)
        before[name] = parameter.detach().clone()
    trainer.critic.optimizer.step()
    still = {name for name in parameters if name.endswith(".bias") or ".ln_" in name}
    assert {"transformer.ln_f.weight", "transformer.h.0.mlp.c_fc.bias"} < still < parameters.keys()
    for name, parameter in parameters.items():
        expected = before[name] if name in still else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)
