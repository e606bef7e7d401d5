"""One seed of `guided.py`: every way to decode, on the held-out prompts.

python scripts/benchmarks/guided_job.py JOB.json RESULT.json
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmac.config.schema import ModelConfig
from llmac.core.protocols import SamplingParams
from llmac.core.types import Prompt
from llmac.decoding import (
    Decoded,
    beam,
    best_of_n,
    majority_vote,
    token_guided,
    transfer,
    weighted_vote,
)
from llmac.decoding.answers import behind_equals
from llmac.decoding.values import ValueModelSays
from llmac.engines.hf_engine import HFEngine
from llmac.models.loading import load_causal_lm, load_tokenizer
from llmac.models.value_model import ValueModel
from llmac.new_engine import speaking
from llmac.rewards.loader import resolve

MAX_NEW_TOKENS = 50
ANSWERS = (1, 2, 4, 8, 16, 32)
BEAMS = (
    (1, 2, 1),
    (1, 4, 1),
    (2, 2, 1),
    (1, 8, 1),
    (2, 4, 1),
    (1, 4, 2),
    (2, 8, 1),
    (4, 4, 1),
    (1, 4, 4),
)
"""Width, expand, trees."""
BLOCK_TOKENS = 8
"""About a step of the sum."""

Way = Callable[[SamplingParams], list[Decoded]]


def main(job: dict[str, Any]) -> dict[str, Any]:
    rows = [json.loads(line) for line in Path(job["prompts"]).read_text().splitlines()]
    right = resolve("reward_fns/arithmetic.py:reward")
    found: list[dict[str, Any]] = []
    for method, setting, way in ways(job, rows):
        temperature = 0.0 if setting.startswith("greedy") else 1.0
        sampling = SamplingParams(
            temperature=temperature, max_new_tokens=MAX_NEW_TOKENS, seed=job["seed"]
        )
        began = time.process_time()
        decoded = way(sampling)
        seconds = time.process_time() - began
        scores = [
            right(row["prompt"], one.chosen.text, row["answer"])
            for row, one in zip(rows, decoded, strict=True)
        ]
        count = len(rows)
        found.append(
            {
                "method": method,
                "setting": setting,
                "accuracy": sum(scores) / count,
                "tokens": sum(one.sampled_tokens for one in decoded) / count,
                "states": sum(one.valued_states for one in decoded) / count,
                "cpu_ms": 1000 * seconds / count,
            }
        )
    return {"settings": found}


def ways(job: dict[str, Any], rows: list[dict[str, str]]) -> Iterator[tuple[str, str, Way]]:
    """Method, setting, and how to decode; the first of a seed are the ways without a critic."""
    spec = ModelConfig(name=job["policy"])
    tokenizer = load_tokenizer(spec)
    player = speaking(HFEngine(load_causal_lm(spec), tokenizer), tokenizer)
    says = ValueModelSays(ValueModel.from_pretrained(job["critic"]))
    prompts = [
        Prompt(id=str(i), token_ids=player.encode(row["prompt"]), source=row["prompt"])
        for i, row in enumerate(rows)
    ]

    def voting(n: int) -> Way:
        return lambda s: majority_vote(player, prompts, n, answer=behind_equals, sampling=s)

    def best(n: int) -> Way:
        return lambda s: best_of_n(player, says, prompts, n, sampling=s)

    def weighing(n: int) -> Way:
        return lambda s: weighted_vote(player, says, prompts, n, answer=behind_equals, sampling=s)

    def searching(width: int, expand: int, trees: int) -> Way:
        return lambda s: beam(
            player,
            says,
            prompts,
            block_tokens=BLOCK_TOKENS,
            width=width,
            expand=expand,
            trees=trees,
            answer=behind_equals,
            sampling=s,
        )

    yield "plain sampling", "greedy", voting(1)
    yield "plain sampling", "temperature 1", voting(1)
    for n in ANSWERS[2:]:
        yield "majority vote", f"n {n}", voting(n)
    for n in ANSWERS[1:]:
        yield "best of n", f"n {n}", best(n)
    for n in ANSWERS[1:]:
        yield "weighted vote", f"n {n}", weighing(n)
    for width, expand, trees in BEAMS:
        setting = f"{trees} x {width} beams, {expand} blocks of {BLOCK_TOKENS}"
        yield "block beam", setting, searching(width, expand, trees)
    model = load_causal_lm(spec)

    def guided(**how: Any) -> Way:
        return lambda s: token_guided(model, tokenizer, says, prompts, sampling=s, top_k=5, **how)

    for lam in (1.0, 4.0, 16.0):
        yield (
            "token, ratio",
            f"probability, lam {lam:g}",
            guided(scale="probability", lam=lam),
        )
    yield "token, ratio", "greedy, probability, lam 16", guided(scale="probability", lam=16.0)
    yield "token, ratio", "logit, lam 1", guided(scale="logit", lam=1.0)
    for lam in (5.0, 20.0):
        yield "token, tilt", f"lam {lam:g}", guided(rule="tilt", lam=lam)
    tuned = load_causal_lm(ModelConfig(name=job["tuned"]))

    def shifted(base: Any, lam: float) -> Way:
        pair = [(tuned, model)]
        return lambda s: transfer(base, tokenizer, pair, prompts, lam=lam, sampling=s)

    yield "the tuned small model", "temperature 1", shifted(model, 1.0)
    if job["large"]:
        large = load_causal_lm(ModelConfig(name=job["large"]))
        for lam in (0.0, 0.5, 1.0):
            yield "transfer to a larger one", f"lam {lam:g}", shifted(large, lam)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
