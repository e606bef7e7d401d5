"""The quickstart's GRPO job on TRL's GRPOTrainer; `against_trl.py` runs it with the Python of .venv-trl.

    .venv-trl/bin/python scripts/benchmarks/trl_job.py START STEPS SEED OUTPUT RESULT.json

Every setting is what recipes/quickstart_grpo.yaml and llmac's defaults say, in TRL's words. A step is one batch of
32 prompts x 8 completions and the two optimizer steps on it.
"""

import json
import sys
from pathlib import Path

import torch
from clocked_reward import calls, final_number_is_right
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

PROMPTS, GROUP, UPDATES = 32, 8, 2


def settings(steps: int, seed: int, output: Path) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(output),
        max_steps=steps * UPDATES,
        per_device_train_batch_size=PROMPTS * GROUP // UPDATES,
        gradient_accumulation_steps=1,
        steps_per_generation=UPDATES,
        num_generations=GROUP,
        num_iterations=1,
        max_completion_length=50,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=UPDATES,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )


def main(start: Path, steps: int, seed: int, output: Path, result: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(start / "policy")
    model = AutoModelForCausalLM.from_pretrained(start / "policy", dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=final_number_is_right,
        args=settings(steps, seed, output),
        train_dataset=load_dataset("json", data_files=str(start / "train.jsonl"), split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    result.write_text(json.dumps(calls))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5])
    )
