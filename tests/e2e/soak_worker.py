"""Many syncs in one job: ZeRO-3 shards to a vLLM in every process, again and again, while memory is watched.

Run by tests/e2e/test_soak.py: `accelerate launch ... soak_worker.py MODEL OUTPUT SYNCS BUCKET_BYTES`.
"""

import ctypes
import json
import sys
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmac.core.protocols import Request, SamplingParams
from llmac.engines.vllm_engine import VLLMEngine
from llmac.runtime.context import Runtime
from llmac.runtime.weights import full_weights

LEARN_EVERY, SAMPLE_EVERY, LOOK_EVERY = 5, 20, 5


def main(model, output, syncs, bucket_bytes):
    runtime = Runtime.create(seed=0, output=None)
    with runtime.loading(torch.float32):
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trained = runtime.train(
        policy, lambda module: torch.optim.AdamW(module.parameters()), max_norm=1.0
    )
    engine = VLLMEngine(model, AutoTokenizer.from_pretrained(model), kv_cache_mb=8)
    prompt = (2, 3)
    request = Request(prompt_ids=prompt, params=SamplingParams(max_new_tokens=8, seed=runtime.rank))
    found = {"versions": [], "sampled": [], "resident": [], "said": [], "expected": []}
    for sync in range(1, syncs + 1):
        if sync % LEARN_EVERY == 0:
            noise = torch.randint(2, 9, (4, 8))
            with trained.accumulate(sync=True):
                trained.backward(trained.learning(noise, labels=noise).loss)
            trained.step(lr=1e-4)
        engine.load_weights(full_weights(trained.learning, bucket_bytes=bucket_bytes), sync)
        found["versions"].append(engine.policy_version)
        if sync % SAMPLE_EVERY == 0:
            [[completion]] = engine.generate([request])
            found["sampled"].append(completion.policy_version)
        if sync % LOOK_EVERY == 0:
            found["resident"].append(resident_bytes())
    found["said"] = list(completion.logprobs)
    found["expected"] = logprobs_of(trained.looking, prompt, completion.token_ids)
    (Path(output) / f"rank-{runtime.rank}.json").write_text(json.dumps(found))
    engine.close()
    runtime.close()


def resident_bytes():
    """Memory of this process, without what the C library has been given back and keeps for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss


@torch.no_grad()
def logprobs_of(model, prompt, response):
    """Log π of the response by the weights in training."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), list(response)].tolist()


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
