"""Sampling speed of the engines on one model, in turn in one process; writes JSON.

python scripts/benchmarks/rollout_job.py MODEL PROMPTS.jsonl ROUNDS RESULT.json
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmac.core.protocols import Request, SamplingParams
from llmac.engines.hf_engine import HFEngine
from llmac.errors import EngineError

PROMPTS, GROUP, NEW_TOKENS = 32, 8, 50

Sample = Callable[[int], int]
"""Seed -> response tokens sampled."""


def with_generate(model, tokenizer, prompts) -> Sample:
    """`model.generate` as it comes, the engine most trainers embed."""
    rows = [list(prompt) for prompt in prompts for _ in range(GROUP)]
    assert len({len(row) for row in rows}) == 1, "prompts of one length need no padding"
    ids = torch.tensor(rows)
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    options = {"attention_mask": torch.ones_like(ids), "generation_config": sampling}

    @torch.no_grad()
    def sample(seed: int) -> int:
        torch.manual_seed(seed)
        new = model.generate(ids, **options)[:, ids.shape[1] :]
        ended = (new == tokenizer.eos_token_id).cumsum(1)
        return int((ended - (new == tokenizer.eos_token_id).int() == 0).sum())

    return sample


def with_engine(engine, prompts) -> Sample:
    """Tokens with their log-probs, as training gets them."""

    def sample(seed: int) -> int:
        params = SamplingParams(n=GROUP, temperature=1.0, max_new_tokens=NEW_TOKENS, seed=seed)
        requests = [Request(prompt_ids=prompt, params=params) for prompt in prompts]
        return sum(len(c.token_ids) for group in engine.generate(requests) for c in group)

    return sample


def vllm_engine(folder: str, tokenizer):
    from llmac.engines.vllm_engine import VLLMEngine

    return VLLMEngine(folder, tokenizer, dtype="float32", max_model_len=64, enforce_eager=True)


def main(folder: str, prompt_file: Path, rounds: int, result: Path) -> None:
    threads = torch.get_num_threads()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["prompt"] for line in prompt_file.read_text().splitlines()[:PROMPTS]]
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    model = load()
    parameters = model.num_parameters()
    samplers = {"transformers generate": with_generate(model, tokenizer, prompts)}
    samplers["hf"] = with_engine(HFEngine(load(), tokenizer), prompts)
    absent = {}
    if find_spec("vllm") is None:
        absent["vllm"] = "not installed"
    else:
        try:
            samplers["vllm"] = with_engine(vllm_engine(folder, tokenizer), prompts)
        except EngineError as error:
            absent["vllm"] = str(error).splitlines()[0]
    found: dict[str, list] = {name: [] for name in samplers}
    for seed in range(rounds + 1):
        for name, sample in samplers.items():
            torch.set_num_threads(threads)
            begun, cpu_begun = time.perf_counter(), time.process_time()
            tokens = sample(seed)
            seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu_begun
            if seed:  # the first round warms up
                found[name].append({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu})
    result.write_text(json.dumps({"parameters": parameters, "rounds": found, "absent": absent}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
