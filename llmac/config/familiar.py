"""What people call things in TRL, verl and OpenRLHF, for error messages: their name -> ours."""

FAMILIAR: dict[str, str] = {
    "adv_estimator": "algorithm.name",
    "alg": "algorithm.name",
    "batch_size": "actor.prompts_per_step",
    "beta": "algorithm.kl_coef",
    "bf16": "model.compute_dtype",
    "clip_ratio": "algorithm.clip_low",
    "cliprange": "algorithm.clip_low",
    "cliprange_high": "algorithm.clip_high",
    "cliprange_low": "algorithm.clip_low",
    "cliprange_value": "critic.value_clip",
    "critic_lr": "critic.lr",
    "critic_warmup": "run.critic_warmup_steps",
    "dataset": "data.name",
    "dataset_name": "data.name",
    "dataset_split": "data.split",
    "delta": "algorithm.dual_clip",
    "discount": "algorithm.gamma",
    "eps_clip": "algorithm.clip_low",
    "epsilon": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "eval_every": "evaluation.every",
    "eval_steps": "evaluation.every",
    "gae_lambda": "algorithm.lam",
    "grad_clip": "actor.max_grad_norm",
    "gradient_accumulation_steps": "actor.max_tokens_per_microbatch",
    "lambda": "algorithm.lam",
    "learning_rate": "actor.lr",
    "lmbda": "algorithm.lam",
    "logger": "run.trackers",
    "loss_type": "algorithm.name",
    "max_completion_length": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "max_steps": "run.steps",
    "max_tokens": "rollout.max_new_tokens",
    "micro_batch_size": "actor.max_tokens_per_microbatch",
    "mini_batch_size": "actor.minibatches",
    "model_name_or_path": "model.name",
    "n_samples_per_prompt": "algorithm.group_size",
    "num_generations": "algorithm.group_size",
    "num_iterations": "actor.epochs",
    "num_mini_batches": "actor.minibatches",
    "num_ppo_epochs": "actor.epochs",
    "output_dir": "run.output",
    "per_device_train_batch_size": "actor.max_tokens_per_microbatch",
    "ppo_epochs": "actor.epochs",
    "reference_model": "model.reference",
    "report_to": "run.trackers",
    "response_length": "rollout.max_new_tokens",
    "reward_funcs": "reward.functions",
    "reward_model": "reward.functions",
    "reward_model_path": "reward.functions",
    "rollout_batch_size": "actor.prompts_per_step",
    "save_freq": "run.save_every",
    "save_steps": "run.save_every",
    "scale_rewards": "algorithm.scale",
    "sft_model_path": "model.name",
    "total_epochs": "run.steps",
    "total_steps": "run.steps",
    "train_batch_size": "actor.prompts_per_step",
    "use_vllm": "rollout.engine",
    "value_lr": "critic.lr",
    "warmup": "actor.warmup_steps",
}
"""Key elsewhere -> key here."""


def suggestion(key: str, *, instead_of: str) -> str:
    """` Did you mean actor.lr?` when the key is another library's word for something here, else nothing.

    >>> suggestion("learning_rate", instead_of="actor")
    ' Did you mean actor.lr?'
    """
    here = FAMILIAR.get(key)
    return f" Did you mean {here}?" if here and here != f"{instead_of}.{key}" else ""
