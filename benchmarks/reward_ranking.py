"""Speed of reward-model training: the same rankings through TRL on pairs, one row a completion, and the shared prefix.

    python -m benchmarks.reward_ranking                    # all nine cases
    python -m benchmarks.reward_ranking --quick            # one case, K = 9 at 128+128, in a few minutes on 2 cores
    python -m benchmarks.reward_ranking --cases 9:384+128 4:128+128 --bf16

Routes, end to end through trainer.train():
    (a) trl.RewardTrainer on all pairs of a prompt, 2 rows a pair;
    (b) RankingRewardTrainer(prefix_sharing="off"), one row a completion;
    (c) RankingRewardTrainer(prefix_sharing="on"), the prompt once;
    floor: a bare forward and backward of P + ΣC tokens a prompt through the same backbone, as causal rows of length
        P + C: no trainer, no optimizer, no head, no loss to speak of, no padding.
Each route has a process of its own for each case, so that peak memory is its own. The processes take turns, one
optimizer step at a time (a, b, c, floor, a, b, c, floor, ...), and the others sleep meanwhile. The first step of each
warms up and is not counted, nor is any set-up. Figures are medians over the rounds. Judge by the ratios: seconds are
this machine's.

Weights are random and tokens are random, since speed depends on neither. The optimizer is plain SGD in (a), (b) and
(c), and a step holds several prompts, so that the optimizer weighs little.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import machine, table
from benchmarks.ranking_routes import ROUTES, Case, work

CASES = [Case(k, p, c) for k in (2, 4, 9) for p, c in ((128, 128), (384, 128), (128, 384))]
PAUSE = 0.3  # seconds; OpenMP threads spin for 0.2 s after their last work and would disturb the next route


class Route:
    """One process that works through its route, one optimizer step whenever it is told to."""

    def __init__(self, name: str, case: Case, rows: list[dict], args: argparse.Namespace):
        context = get_context("spawn")
        self.name = name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, name, case, rows, vars(args)), daemon=True)
        self.process.start()
        other.close()
        self.seconds: list[float] = []
        self.summary: dict[str, Any] = {}
        self.error = ""

    def receive(self) -> Any:
        """The next message; None if the route failed, and then `error` says why."""
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            self.error = f"the process died with exit code {self.process.exitcode} (−9: out of memory)"
            return None
        if isinstance(message, str):
            self.error = message
            return None
        return message

    def step(self) -> None:
        time.sleep(PAUSE)
        self.pipe.send(True)
        seconds = self.receive()
        if seconds is not None:
            self.seconds.append(seconds)

    def finish(self) -> None:
        if not self.error:
            self.pipe.send(False)
            self.summary = self.receive() or {}
        self.process.join()


def draw_rows(case: Case, prompts: int, vocabulary: int, ragged: bool, seed: int = 0) -> list[dict]:
    """Rankings of random words, one token each; lengths exact, or uniform in half to one and a half times if ragged.

    The completion has one word less than the case says: the EOS is its last token.
    """
    generator = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{generator.randrange(vocabulary - 3)}" for _ in range(count))

    def length(nominal: int) -> int:
        return generator.randint(nominal // 2, nominal * 3 // 2) if ragged else nominal

    rows = []
    for _ in range(prompts):
        completions = [words(max(1, length(case.answer) - 1)) for _ in range(case.completions)]
        ranks = generator.sample(range(1, case.completions + 1), case.completions)
        rows.append({"prompt": words(max(1, length(case.prompt))) + " ", "completions": completions, "ranks": ranks})
    return rows


def ideal_gains(rows: list[dict]) -> tuple[float, float]:
    """Tokens of (b) and of (a) over P + ΣC, summed over prompts: K(P+C)/(P+KC) and K(K−1)(P+C)/(P+KC) at equal lengths.

    Each completion is in K − 1 of a prompt's pairs.
    """
    shared = by_rows = by_pairs = 0
    for row in rows:
        prompt = len(row["prompt"].split())
        lengths = [len(completion.split()) + 1 for completion in row["completions"]]
        shared += prompt + sum(lengths)
        by_rows += sum(prompt + length for length in lengths)
        by_pairs += sum(prompt + length for length in lengths) * (len(lengths) - 1)
    return by_rows / shared, by_pairs / shared


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """All routes of one case in turns; returns, by route, median ms a prompt, positions a prompt and peak MB."""
    rows = draw_rows(case, args.prompts, args.vocabulary, args.ragged)
    routes = [Route(name, case, rows, args) for name in ROUTES if name in args.routes]
    for route in routes:
        if route.receive() is not None:  # set up; the warm-up step follows alone, not beside the others
            route.pipe.send(True)
            route.receive()
    for number in range(args.rounds):
        for route in routes:
            if not route.error and not (route.name == "a" and number >= args.pair_rounds):
                route.step()
    result: dict[str, Any] = {"case": str(case)}
    result["ideal_over_rows"], result["ideal_over_pairs"] = ideal_gains(rows)
    for route in routes:
        route.finish()
        if route.error or not route.seconds:
            print(f"# {case}, route {route.name}: {route.error or 'no step was timed'}", flush=True)
            continue
        counted, logged = (route.summary.get(key, 0.0) for key in ("positions", "tokens_computed_logged"))
        if logged and abs(logged - counted) > 0.01 * counted:
            print(f"# {case}, route {route.name}: the trainer logs {logged:.0f} tokens a prompt, {counted:.0f} counted")
        per_prompt = [1000 * seconds / route.summary["prompts"] for seconds in route.seconds]
        result[route.name] = {"ms": statistics.median(per_prompt), "all_ms": per_prompt, **route.summary}
    return result


def ratio(result: dict[str, Any], over: str, under: str) -> float | None:
    return result[over]["ms"] / result[under]["ms"] if over in result and under in result else None


def line_of(result: dict[str, Any]) -> list[str]:
    """One row of the table."""

    def each(key: str) -> str:
        return " / ".join(f"{result[name][key]:,.0f}" if name in result else "–" for name in ROUTES)

    def gain(over: str, ideal: float) -> str:
        got = ratio(result, over, "c")
        return f"– of {ideal:.2f}" if got is None else f"{got:.2f} of {ideal:.2f} ({got / ideal:.2f})"

    floor = ratio(result, "c", "floor")
    return [
        *result["case"].split(":"),
        each("ms"),
        gain("b", result["ideal_over_rows"]),
        gain("a", result["ideal_over_pairs"]),
        "–" if floor is None else f"{floor:.2f}",
        each("positions"),
        each("peak_mb"),
    ]


HEADER = [
    "K",
    "prompt+answer",
    "ms a prompt: a / b / c / floor",
    "gain of c over b (share of ideal)",
    "gain of c over a (share of ideal)",
    "c over floor",
    "positions computed a prompt: a / b / c / floor",
    "peak MB: a / b / c / floor",
]


def verdicts(result: dict[str, Any]) -> list[str]:
    """The targets at K = 9, each met or missed."""
    checks = []
    over_rows, over_pairs, floor = ratio(result, "b", "c"), ratio(result, "a", "c"), ratio(result, "c", "floor")
    if over_rows is not None:
        need = 0.9 * result["ideal_over_rows"]
        checks.append((f"gain over (b) {over_rows:.2f}, to reach {need:.2f} (0.9 of ideal)", over_rows >= need))
        peaks = [result[name]["peak_mb"] for name in ("c", "b")]
        checks.append((f"peak memory {peaks[0]:,.0f} MB, to be below (b)'s {peaks[1]:,.0f}", peaks[0] < peaks[1]))
    if over_pairs is not None:
        need = 0.85 * result["ideal_over_pairs"]
        checks.append((f"gain over (a) {over_pairs:.2f}, to reach {need:.2f} (0.85 of ideal)", over_pairs >= need))
    if floor is not None:
        checks.append((f"{floor:.2f} times the floor, to stay within 1.10", floor <= 1.1))
    return [f"{result['case']}: {text}: {'met' if met else 'missed'}" for text, met in checks]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=CASES, help="K:PROMPT+ANSWER, e.g. 9:128+128")
    parser.add_argument("--quick", action="store_true", help="9:128+128 alone, 2 prompts a step, 3 rounds, (a) in 1")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--prompts", type=int, default=4, help="prompts an optimizer step (default: 4)")
    parser.add_argument(
        "--pair_prompts",
        type=int,
        help="prompts a step of (a) alone; its time is given a prompt all the same, and its optimizer step is a small "
        "part of it (default: 1 from 20 pairs a prompt on unless --ragged, else as many as --prompts)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed optimizer steps of each route (default: 5)")
    parser.add_argument("--pair_rounds", type=int, default=2, help="rounds that (a), the slow one, joins (default: 2)")
    parser.add_argument("--prompts_per_forward", type=int, help="default: 8 // K, at least 1")
    parser.add_argument("--ragged", action="store_true", help="each length uniform in 0.5 to 1.5 times the nominal one")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast in all routes; default: float32")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in all routes; default: off")
    parser.add_argument("--two_pass", action="store_true", help="(c) in the two-pass mode, which bounds memory")
    parser.add_argument("--max_tokens_per_batch", type=int, help="for (b) and (c)")
    parser.add_argument("--attention", default="sdpa", help="attention implementation of all routes (default: sdpa)")
    parser.add_argument("--hidden", type=int, default=576, help="multiple of 18; 9 heads, 3 of keys (default: 576)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--json", type=Path, help="also write all figures here")
    args = parser.parse_args()
    if args.quick:
        args.cases, args.prompts, args.rounds, args.pair_rounds = [Case(9, 128, 128)], 2, 3, 1
    return args


def main() -> None:
    args = parse()
    begin = time.perf_counter()
    results = []
    for case in args.cases:
        results.append(measure(case, args))
        print(f"# {case} done after {time.perf_counter() - begin:.0f} s", flush=True)
    print("\n" + table(HEADER, [line_of(result) for result in results]))
    print(
        "\nMedians of taking turns. Ideal: K(P+C)/(P+KC) over (b), K(K−1)(P+C)/(P+KC) over (a), of the true lengths.\n"
        "The floor is the same number of tokens, P + ΣC a prompt, in causal rows of length P + C; weights are random."
    )
    for result in results:
        if result["case"].startswith("9:"):
            print("\n".join(verdicts(result)))
    done = [result[name] for result in results for name in ROUTES if name in result]
    if done:
        precision = "bf16 autocast" if args.bf16 else "float32"
        print(
            f"\nLlama, hidden {args.hidden}, {args.layers} layers, vocabulary {args.vocabulary:,}; {precision}, ",
            end="",
        )
        print(f"{args.attention}, checkpointing {'on' if args.gradient_checkpointing else 'off'}, SGD.")
        print(machine(done[0]["threads"], done[0]["device"]))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
