"""Segments valued by continuations and by trees, sampled by a real vLLM in process."""

import importlib.util
import json

import pytest
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

CHAIN = {
    "algorithm": {"name": "spo_chain", "group_size": 2, "cut_interval": 2},
    "critic": {"name": "monte_carlo", "continuations": 3},
}
TREE = {"algorithm": {"name": "spo_tree", "branching": [3, 2], "segment_tokens": 4}}


@pytest.mark.parametrize("change", [CHAIN, TREE], ids=["chain", "tree"])
def test_prompts_that_begin_alike_are_read_once(
    change, settings, vllm_home, write_recipe, run, read_metrics, tmp_path
):
    config = Qwen2Config.from_pretrained(vllm_home)
    config.max_position_embeddings = 128
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(vllm_home).save_pretrained(tmp_path / "model")
    # Longer than a block of vLLM's cache, which has 32 tokens on CPU.
    lines = [{"prompt": f"{letter * 39}=", "wanted": letter} for letter in "abcdef"]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings |= {**change, "model": {"name": str(tmp_path / "model")}}
    settings["data"] = {"name": str(tmp_path / "train.jsonl")}
    settings["rollout"] = {"engine": "vllm", "max_new_tokens": 8, "probe_every": 1}
    settings["run"] |= {"steps": 2, "save_every": 2}
    code, printed = run(write_recipe(settings)).finish()
    assert code == 0, printed
    assert "reads prompt and response anew" not in printed
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines][-2:] == [1, 2]
    for line in lines[-2:]:
        # Of prompts of 40 to 47 tokens one block is shared, by all that ask for it but the first.
        assert 0.5 < line["rollout/prefix_hit_rate"] <= 32 / 40
        assert line["rollout/sampled_tokens"] > line["rollout/tokens"]
        assert line["actor/sampler_logprob_diff_max"] < 1e-3
