"""A larger policy that has copied the quickstart's student: 0.9 instead of 0.15 million parameters.

python scripts/benchmarks/guided_large.py FOLDER SEED
"""

import random
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2] / "recipes"))
import quickstart


def main(folder: Path, seed: int) -> None:
    torch.manual_seed(seed + 1000)
    small = quickstart.make_model().config
    wider = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    model = Qwen2ForCausalLM(Qwen2Config(**{**small.to_dict(), **wider, "layer_types": None}))
    tokenizer = quickstart.make_tokenizer()
    quickstart.warm_up(
        model, tokenizer, random.Random(seed + 1000), steps=quickstart.WARM_UP_STEPS, lr=4e-3
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
