"""Reference, reward and value of the same tokens on one base: three passes, or one with an adapter a row.

    python -m benchmarks.role_passes [--layers 8 --hidden 256 --rows 16 --tokens 64 --rank 16]

PEFT can give each row of a batch an adapter of its own (`adapter_names`, inference only). One pass over three times the
rows then replaces three. Both routes alternate in one run and are compared in result. The heads are left out.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from instruct_trl import RoleAdapters
from instruct_trl._upstream import backbone

ROLES = {"reference": "sft", "reward": "reward", "value": "critic"}


def make_roles(args: argparse.Namespace, root: Path) -> RoleAdapters:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=8, num_key_value_heads=8, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for name, kind, task in (
        ("sft", LlamaForCausalLM, "CAUSAL_LM"),
        ("rm", LlamaForSequenceClassification, "SEQ_CLS"),
    ):
        lora = LoraConfig(task_type=task, r=args.rank, target_modules=targets, init_lora_weights=False)
        get_peft_model(kind(config), lora).save_pretrained(root / name)
    return RoleAdapters(LlamaForCausalLM(config), root / "sft", root / "rm")


def three_passes(roles: RoleAdapters, ids: torch.Tensor) -> list[torch.Tensor]:
    """The last hidden states (rows, tokens, hidden) of each role, one after the other."""
    states = []
    for role in ROLES:
        with roles.active(role):
            states.append(backbone(roles.model.get_base_model())(input_ids=ids, use_cache=False).last_hidden_state)
    return states


def switch_only(roles: RoleAdapters, ids: torch.Tensor) -> list[torch.Tensor]:
    """What switching to three roles and back costs."""
    for role in ROLES:
        with roles.active(role):
            pass
    return [ids]


def one_pass(roles: RoleAdapters, ids: torch.Tensor) -> list[torch.Tensor]:
    """The same from one batch of 3 × rows."""
    names = [name for name in ROLES.values() for _ in range(len(ids))]
    output = roles.model(
        input_ids=ids.repeat(3, 1), adapter_names=names, use_cache=False, output_hidden_states=True, logits_to_keep=1
    )
    return list(output.hidden_states[-1].chunk(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("hidden", 256), ("rows", 16), ("tokens", 64), ("rank", 16), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        roles = make_roles(args, Path(folder))
    roles.model.to(device).eval()
    ids = torch.randint(1, 4096, (args.rows, args.tokens), device=device)
    routes = {"three passes": three_passes, "one pass": one_pass, "switching alone": switch_only}
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    with torch.no_grad():
        pairs = zip(three_passes(roles, ids), one_pass(roles, ids), strict=True)
        gap = max((one - two).abs().max().item() for one, two in pairs)
        for _ in range(args.repeats):
            for name, route in routes.items():
                begin = time.perf_counter()
                route(roles, ids)[0].sum().item()
                seconds[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name}: {value * 1000:.1f} ms")
    ratio = median["three passes"] / median["one pass"]
    print(f"one pass is {ratio:.2f} times as fast; hidden states differ by at most {gap:.1e}; {device}, {args}")


if __name__ == "__main__":
    main()
