"""A tiny architecture as a configuration-only folder, and a recipe over it."""

import json

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
RECIPE = {
    "data": {"name": "rows.jsonl", "prompt": "{question}"},
    "reward": "reward_fns/gsm8k.py:reward",
    "run": {"steps": 4, "output": "runs/plan"},
    "actor": {"prompts_per_step": 16, "max_tokens_per_microbatch": 256},
    "rollout": {"engine": "hf", "max_new_tokens": 32},
}


def folder_of(path, **sizes):
    """A model folder with nothing but a configuration."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(QWEN2 | sizes))
    return str(path)
