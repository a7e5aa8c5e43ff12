"""Ways to compute a prompt once for its K completions, against one row a completion and against a floor.

    python -m benchmarks.prefix_routes [--hidden 576 --layers 8 --completions 9 --lengths 128+128 384+128 128+384]

Rows:    one row a completion, prompt included.
Cut:     one packed row, attention computed by prompts and completions (`instruct_trl.models.prefix_sharing`).
Mask:    one packed row under a dense mask.
Cache:   the prompt's keys and values, with gradient, handed to K rows of completions.
Floor:   the backbone on as many tokens as prompt and completions have, in causal rows of prompt + answer.

Forward and backward of one prompt in float32, taking turns in one run; medians. A random Llama: time does not depend on
its weights. All routes but the floor give the same scores, which is checked first.
"""

import argparse
import platform
import statistics
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForSequenceClassification

from instruct_trl.data.prefix_layout import GroupedRows, PrefixLayout
from instruct_trl.models.prefix_sharing import PrefixSharing
from instruct_trl.models.scores import score_rows


def make_model(hidden: int, layers: int) -> LlamaForSequenceClassification:
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 192)}
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_hidden_layers": layers}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=4096, num_labels=1, pad_token_id=0, **sizes, **heads))


def make_routes(model: LlamaForSequenceClassification, prompt: int, answer: int, k: int) -> dict:
    """Functions without arguments that give the scores (K,) of one prompt, and the floor's hidden states."""
    prefix, own = torch.randint(3, 4000, (prompt,)), torch.randint(3, 4000, (k, answer))
    rows = torch.cat([prefix.expand(k, -1), own], dim=1)
    ones = torch.ones_like(rows)
    grouped = GroupedRows(rows, ones, torch.tensor([k]), torch.tensor([prompt]))
    sharing, layout = PrefixSharing(model), PrefixLayout.of(grouped)
    packed = layout.input_ids.shape[1]
    visible = layout.block_mask(None).mask_mod(
        0, 0, *torch.meshgrid(torch.arange(packed), torch.arange(packed), indexing="ij")
    )
    positions = torch.arange(prompt, prompt + answer).expand(k, -1)
    floor = rows[: max(1, round(packed / (prompt + answer)))]

    def masked() -> torch.Tensor:
        inputs = {"position_ids": layout.position_ids, "attention_mask": visible[None, None], "use_cache": False}
        hidden = model.model(layout.input_ids, **inputs).last_hidden_state
        return model.score(hidden)[0, layout.last, 0]

    def cached() -> torch.Tensor:
        cache = model.model(prefix[None], use_cache=True, past_key_values=DynamicCache()).past_key_values
        cache.batch_repeat_interleave(k)
        hidden = model.model(own, past_key_values=cache, attention_mask=ones, position_ids=positions).last_hidden_state
        return model.score(hidden[:, -1])[:, 0]

    return {
        "rows": lambda: score_rows(model, rows, ones),
        "cut": lambda: sharing.score(model, grouped)[0],
        "mask": masked,
        "cache": cached,
        "floor": lambda: model.model(floor, use_cache=False).last_hidden_state,
    }


def alternate(model: torch.nn.Module, routes: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each route, forward and backward, taking turns; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for repeat in range(repeats + 1):
        for name, route in routes.items():
            model.zero_grad()
            begin = time.perf_counter()
            route().sum().backward()
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--completions", type=int, default=9, help="K")
    parser.add_argument("--lengths", nargs="+", default=["128+128", "384+128", "128+384"], help="prompt+answer tokens")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model, k = make_model(args.hidden, args.layers), args.completions
    print(f"| prompt + answer, K = {k} | ideal gain | cut | mask | cache | cut over floor |\n|---|---|---|---|---|---|")
    for lengths in args.lengths:
        prompt, answer = (int(n) for n in lengths.split("+"))
        routes = make_routes(model, prompt, answer, k)
        scores = {name: route().detach() for name, route in routes.items() if name != "floor"}
        for name, values in scores.items():
            torch.testing.assert_close(values, scores["rows"], rtol=1e-4, atol=1e-4, msg=f"{name} gives other scores")
        seconds = alternate(model, routes, args.repeats)
        tokens = prompt + k * answer
        floor = seconds["floor"] * tokens / (max(1, round(tokens / (prompt + answer))) * (prompt + answer))
        gains = " | ".join(f"{seconds['rows'] / seconds[name]:.2f}" for name in ("cut", "mask", "cache"))
        ideal = k * (prompt + answer) / tokens
        print(f"| {lengths} | {ideal:.2f} | {gains} | {seconds['cut'] / floor:.2f} |", flush=True)
    print(f"\n{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
