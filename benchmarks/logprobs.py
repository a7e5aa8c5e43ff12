"""Log-probs of completion tokens: TRL's fused head against one projection of the completion positions.

    python -m benchmarks.logprobs [MODEL] [--rows 16 --prompt 6 --completion 28]

Both routes alternate in one run; the ratio is what counts. Without MODEL, the demo's SmolLM2-135M.
"""

import argparse
import copy
import statistics
import time

import torch
from instruct_trl.recipes.demo.prepare import base_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from instruct_trl.models.logprobs import completion_logps


def alternate(routes: dict, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each route, forward and forward with backward, taking turns; the first round only warms up."""
    seconds: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for name, (model, route) in routes.items():
            for grad in (False, True):
                begin = time.perf_counter()
                with torch.autocast(device.type, torch.bfloat16), torch.set_grad_enabled(grad):
                    logps = route()
                if grad:
                    logps.sum().backward()
                    model.zero_grad()
                if repeat:
                    key = f"{name}, {'forward and backward' if grad else 'forward'}"
                    seconds.setdefault(key, []).append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    for name, default in (("rows", 16), ("prompt", 6), ("completion", 28), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    plain = AutoModelForCausalLM.from_pretrained(args.model or base_model(), dtype=torch.float32).to(device)
    fused = copy.deepcopy(plain)
    add_fused_lm_head(fused, outputs=("log_probs", "entropy"))
    ids = torch.randint(5, plain.config.vocab_size, (args.rows, args.prompt + args.completion), device=device)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, : args.prompt] = -100

    def by_fused() -> torch.Tensor:
        return fused(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs

    def by_plain() -> torch.Tensor:
        return completion_logps(plain, ids, mask, args.completion, compute_entropy=True)[0]

    seconds = alternate({"fused": (fused, by_fused), "plain": (plain, by_plain)}, device, args.repeats)
    for key, values in seconds.items():
        print(f"{key:32} {statistics.median(values):.3f} s")
    for kind in ("forward", "forward and backward"):
        ratio = statistics.median(seconds[f"fused, {kind}"]) / statistics.median(seconds[f"plain, {kind}"])
        print(f"fused / plain, {kind}: {ratio:.2f}")


if __name__ == "__main__":
    main()
