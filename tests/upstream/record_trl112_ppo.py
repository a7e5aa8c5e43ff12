"""Records what PPOTrainer of TRL 1.12.0, the last release that has one, computes in one iteration of a tiny model.

    pip install --no-deps --target trl112 trl==1.12.0
    python tests/upstream/record_trl112_ppo.py trl112

Writes trl_1_12_ppo.json beside this file: models, rollout, and every number between them, with the versions. Two
iterations are recorded, both float32 on the CPU, two optimizer steps each:
    full: no stop token, so that all answers have one length;
    ended: answers end with EOS, and padding follows.
"""

import json
import platform
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

VOCABULARY, PAD, EOS, PROMPTS, LENGTH = 16, 0, 1, 8, 6
SETTINGS = {"kl_coef": 0.1, "kl_estimator": "k1", "cliprange": 0.2, "cliprange_value": 0.02, "gamma": 0.97, "lam": 0.9}
# Names in PPOTrainer.train: of the rollout, when it whitens; of a micro-batch, when it goes backward.
ROLLOUT = (
    "query_responses responses logprobs ref_logprobs values scores kl rewards returns padding_mask padding_mask_p1"
)
UPDATE = "micro_batch_inds mb_advantage new_logprobs vpred pg_loss vf_loss ratio"


def plain(tensor):
    """Nested lists; floats with the digits that float32 has."""
    if hasattr(tensor, "tolist"):
        tensor = tensor.tolist()
    if isinstance(tensor, list):
        return [plain(item) for item in tensor]
    return float(f"{tensor:.9g}") if isinstance(tensor, float) else tensor


def models():
    """(policy, reference, reward model, value model): tiny Llamas, no two alike."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    config = LlamaConfig(**sizes, **tokens, num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3)
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    with torch.no_grad():  # the reference is near the policy
        for mine, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
            mine.copy_(theirs + 0.05 * torch.randn_like(theirs))
    config.num_labels = 1
    return policy, reference, LlamaForSequenceClassification(config), LlamaForSequenceClassification(config)


def tokenizer():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{index}": index for index in range(2, VOCABULARY)}}
    raw = Tokenizer(kinds.WordLevel(words, unk_token="w2"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def record(stop_token):
    """One iteration in which no answer holds a pad token of its own: TRL would take it for the end."""
    for seed in range(1000):
        kept = iteration(stop_token, seed)
        if all(PAD not in row[: row.index(EOS) if stop_token and EOS in row else None] for row in kept["responses"]):
            return kept
    raise RuntimeError("every seed draws a pad token")


def iteration(stop_token, seed):
    """One iteration of the trainer, by the numbers."""
    import torch
    from datasets import Dataset

    # Here alone: what is recorded is the trainer that TRL 1.12.0 has there. No test and no code of ours imports it.
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    policy, reference, reward, value = models()
    kept = {}
    draw = random.Random(0)
    rows = [[draw.randrange(2, VOCABULARY) for _ in range(draw.randint(2, 4))] for _ in range(PROMPTS)]
    sizes = {"per_device_train_batch_size": PROMPTS, "gradient_accumulation_steps": 1, "num_mini_batches": 2}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    args = PPOConfig(
        tempfile.mkdtemp(),
        **SETTINGS,
        **sizes,
        **quiet,
        num_ppo_epochs=1,
        total_episodes=PROMPTS,
        response_length=LENGTH,
        stop_token=stop_token,
        temperature=1.0,
        learning_rate=0.02,
        gradient_checkpointing=False,
        num_sample_generations=0,
        local_rollout_forward_batch_size=PROMPTS,
    )
    prompts = Dataset.from_list([{"input_ids": row} for row in rows] * 4)
    trainer = PPOTrainer(
        args, tokenizer(), policy, reference, reward, prompts, value, eval_dataset=prompts.select(range(2))
    )
    whiten, backward = ppo_trainer.masked_whiten, trainer.accelerator.backward

    def whiten_and_keep(values, mask, shift_mean=True):
        names = sys._getframe(1).f_locals
        whitened = whiten(values, mask, shift_mean)
        kept.update({name: plain(names[name]) for name in ROLLOUT.split()})
        kept.update(advantages=plain(values), whitened=plain(whitened.masked_fill(~mask, 0)))
        return whitened

    def backward_and_keep(loss):
        names = sys._getframe(1).f_locals
        update = {name: plain(names[name]) for name in UPDATE.split()}
        kept.setdefault("updates", []).append(update | {"loss": plain(loss)})
        backward(loss)

    ppo_trainer.masked_whiten, trainer.accelerator.backward = whiten_and_keep, backward_and_keep
    trainer.log = lambda metrics: kept.update(metrics=metrics)
    torch.manual_seed(seed)
    trainer.train()
    ppo_trainer.masked_whiten = whiten
    return kept | {"vf_coef": args.vf_coef}


def main():
    sys.path.insert(0, sys.argv[1])
    import trl

    assert trl.__version__ == "1.12.0", f"{trl.__file__} is TRL {trl.__version__}"
    versions = {"trl": trl.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("transformers", "torch", "accelerate")}
    roles = zip(("policy", "reference", "reward", "value"), models(), strict=True)
    weights = {role: {name: plain(value) for name, value in model.state_dict().items()} for role, model in roles}
    runs = {"full": record(None), "ended": record("eos")}
    record_of = {"versions": versions, "settings": SETTINGS, "weights": weights, **runs}
    path = Path(__file__).with_name("trl_1_12_ppo.json")
    path.write_text(json.dumps(record_of, separators=(",", ":")) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}: {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
