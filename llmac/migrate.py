"""A TRL `GRPOConfig` or `PPOConfig` (with its script's and model's arguments) as a recipe.

TRL's defaults are carried over where they differ from ours, so that the recipe trains as the file did. Whatever has
no counterpart is named with the reason; what a recipe needs and the file does not say is left to be filled in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from llmac.config.show import YamlWriter
from llmac.errors import ConfigError

_SHARED_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "save_steps": 500,
    "seed": 42,
    "gradient_checkpointing": True,
    "bf16": True,
}
TRL_DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {
        **_SHARED_DEFAULTS,
        "num_generations": 8,
        "max_completion_length": 256,
        "loss_type": "dapo",
        "learning_rate": 1e-6,
    },
    "ppo": {
        **_SHARED_DEFAULTS,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "kl_coef": 0.05,
        "gamma": 1.0,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "response_length": 53,
        "temperature": 0.7,
        "learning_rate": 3e-6,
    },
}
"""TRL 1.x: what its trainers use when the file is silent. Only keys that change the recipe."""

_PPO_KEYS = frozenset(
    {"num_ppo_epochs", "cliprange", "cliprange_value", "vf_coef", "whiten_rewards"}
) | {
    "response_length",
    "sft_model_path",
    "reward_model_path",
    "missing_eos_penalty",
    "total_episodes",
}

_DIRECT: dict[str, str] = {
    "model_name_or_path": "model.name",
    "sft_model_path": "model.name",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "attn_implementation": "model.attention",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "dataset_name": "data.name",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.split",
    "shuffle_dataset": "data.shuffle",
    "max_prompt_length": "data.max_prompt_tokens",
    "learning_rate": "actor.lr",
    "weight_decay": "actor.weight_decay",
    "adam_epsilon": "actor.eps",
    "max_grad_norm": "actor.max_grad_norm",
    "num_iterations": "actor.epochs",
    "num_ppo_epochs": "actor.epochs",
    "num_generations": "algorithm.group_size",
    "beta": "algorithm.kl_coef",
    "kl_coef": "algorithm.kl_coef",
    "kl_estimator": "algorithm.kl_estimator",
    "epsilon": "algorithm.clip_low",
    "delta": "algorithm.dual_clip",
    "mask_truncated_completions": "algorithm.mask_truncated",
    "gamma": "algorithm.gamma",
    "lam": "algorithm.lam",
    "cliprange_value": "critic.value_clip",
    "max_completion_length": "rollout.max_new_tokens",
    "response_length": "rollout.max_new_tokens",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "vllm_max_model_length": "rollout.max_model_len",
    "vllm_tensor_parallel_size": "rollout.tensor_parallel_size",
    "output_dir": "run.output",
    "seed": "run.seed",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep_last",
}
"""Same meaning, same unit, another name."""

_NOT_HERE: dict[str, str] = {
    "vf_coef": "the critic has its own optimizer; its pace is critic.lr",
    "whiten_rewards": "rewards are not whitened; algorithm.whiten_advantages is on",
    "missing_eos_penalty": "write a reward function that looks at `finish` (reward_fns/README.md)",
    "min_p": "it would bias the importance ratio; training samples from the whole distribution",
    "repetition_penalty": "it would bias the importance ratio; training samples from the policy itself",
    "top_entropy_quantile": "not available",
    "sync_ref_model": "the reference stays as it is",
    "num_train_epochs": "length is counted in steps: run.steps = epochs * rows / actor.prompts_per_step",
    "eval_strategy": "give the held-out set as evaluation.data",
    "eval_steps": "give the held-out set as evaluation.data; this becomes evaluation.every",
    "vllm_mode": "vLLM runs in the training process (colocate)",
    "vllm_enable_sleep_mode": "the engine sleeps by itself while the trainer learns",
    "logging_steps": "metrics are written at every step",
    "remove_unused_columns": "all columns pass through to reward functions",
    "use_liger_kernel": "not available; log-probabilities are computed in chunks (model.logprob_chunk_mb)",
    "deepspeed": "given to accelerate: accelerate launch --config_file recipes/accelerate/...",
    "log_completions": "samples are always written; how often is run.log_completions_every",
}


@dataclass(slots=True)
class Imported:
    """A recipe in the making, and what became of each key."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    mapped: list[str] = field(default_factory=list)
    unmapped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def put(self, path: str, value: Any, origin: str) -> None:
        """Set `section.key` and remember why."""
        section, key = path.split(".")
        self.settings.setdefault(section, {})[key] = value
        self.mapped.append(f"{origin:<42} -> {path}: {value}")

    def report(self) -> str:
        """One line for each key of the file: where it went, or why it did not."""
        parts = [f"mapped ({len(self.mapped)})", *(f"  {line}" for line in self.mapped)]
        parts += [f"not mapped ({len(self.unmapped)})", *(f"  {line}" for line in self.unmapped)]
        if self.missing:
            parts += ["to fill in", *(f"  {line}" for line in self.missing)]
        return "\n".join(parts)

    def yaml(self) -> str:
        """The recipe. What must be filled in stands at the top as comments."""
        order = ("model", "data", "reward", "algorithm", "critic", "actor", "rollout", "run")
        ordered = {name: self.settings[name] for name in order if name in self.settings}
        head = "".join(f"# to fill in: {line}\n" for line in self.missing)
        return head + yaml.dump(ordered, Dumper=YamlWriter, sort_keys=False, allow_unicode=True)


def from_trl(
    config: Mapping[str, Any], *, kind: Literal["grpo", "ppo"] | None = None, processes: int = 1
) -> Imported:
    """Translate a TRL configuration.

    Args:
        config: the YAML's mapping, or `vars()` of the configuration objects together.
        kind: which trainer it was for; None: ppo if it has keys that only PPOConfig has.
        processes: TRL counts batches per process; how many there were.

    Raises:
        ConfigError: sizes that do not divide, or a loss this project does not have.
    """
    kind = kind or ("ppo" if _PPO_KEYS & config.keys() else "grpo")
    result = Imported()
    result.put("algorithm.name", kind, f"{kind.upper()}Config")
    settings = {
        **TRL_DEFAULTS[kind],
        **{key: value for key, value in config.items() if value is not None},
    }
    left = dict(settings)

    def take(key: str) -> Any:
        return left.pop(key, None)

    def origin(*keys: str) -> str:
        words = ", ".join(f"{key}={settings[key]}" for key in keys if key in settings)
        return words if any(key in config for key in keys) else f"{words} (TRL's default)".lstrip()

    _batches(kind, settings, processes, take, origin, result)
    _optimizer(settings, take, origin, result)
    _model(take, origin, result)
    _rewards(take, origin, result)
    _engine(take, origin, result)
    if kind == "grpo":
        _grpo_loss(take, origin, result)
    else:
        _ppo_terms(settings, take, origin, result)
    for key in list(left):
        if key in _DIRECT:
            result.put(_DIRECT[key], left.pop(key), origin(key))
    result.unmapped += [
        f"{key}: {value}  ({_NOT_HERE.get(key, 'no counterpart known')})"
        for key, value in left.items()
    ]
    _complete(result)
    return result


_Take = Callable[[str], Any]
_Origin = Callable[..., str]


def _batches(
    kind: str,
    settings: Mapping[str, Any],
    processes: int,
    take: _Take,
    origin: _Origin,
    result: Imported,
) -> None:
    """TRL counts responses per process and micro-batch; a recipe counts prompts per step, over all processes."""
    device, accumulation = take("per_device_train_batch_size"), take("gradient_accumulation_steps")
    source = (
        origin("per_device_train_batch_size", "gradient_accumulation_steps")
        + f", {processes} processes"
    )
    updates = 1
    if kind == "grpo":
        per_generation = take("steps_per_generation") or accumulation
        responses = take("generation_batch_size") or device * processes * per_generation
        group = settings["num_generations"]
        updates = max(1, responses // (device * processes * accumulation))
        if responses % group:
            raise ConfigError(
                f"a generation batch of {responses} responses is not divisible by num_generations {group}; "
                "pass --processes as the run was launched"
            )
        prompts = responses // group
    else:
        prompts = responses = device * accumulation * processes
        updates = take("num_mini_batches")
    result.put("actor.prompts_per_step", prompts, source)
    if updates > 1:
        result.put(
            "actor.minibatches", updates, source if kind == "grpo" else origin("num_mini_batches")
        )
    if (episodes := take("total_episodes")) is not None:
        result.put("run.steps", -(-episodes // responses), origin("total_episodes"))
    if (steps := take("max_steps")) is not None and steps > 0:
        per_step = updates * settings.get("num_iterations", 1) if kind == "grpo" else 1
        result.put("run.steps", max(1, steps // per_step), origin("max_steps"))


def _optimizer(settings: Mapping[str, Any], take: _Take, origin: _Origin, result: Imported) -> None:
    scheduler = take("lr_scheduler_type")
    known = {
        "linear": "linear",
        "cosine": "cosine",
        "constant": "constant",
        "constant_with_warmup": "constant",
    }
    if scheduler in known:
        result.put("actor.schedule", known[scheduler], origin("lr_scheduler_type"))
    else:
        result.unmapped.append(
            f"lr_scheduler_type: {scheduler}  (choose constant, linear or cosine)"
        )
    first, second = take("adam_beta1"), take("adam_beta2")
    if first is not None or second is not None:
        betas = [0.9 if first is None else first, 0.999 if second is None else second]
        result.put("actor.betas", betas, origin("adam_beta1", "adam_beta2"))
    warmup, ratio = take("warmup_steps"), take("warmup_ratio")
    if warmup and warmup < 1:
        warmup, ratio = None, warmup
    if warmup:
        result.put("actor.warmup_steps", int(warmup), origin("warmup_steps"))
    elif ratio and settings.get("max_steps", 0) > 0:
        result.put(
            "actor.warmup_steps",
            round(ratio * settings["max_steps"]),
            origin("warmup_ratio", "warmup_steps"),
        )
    elif ratio:
        result.unmapped.append(f"warmup_ratio: {ratio}  (set actor.warmup_steps, optimizer steps)")


def _model(take: _Take, origin: _Origin, result: Imported) -> None:
    dtype = take("dtype") or take("torch_dtype")
    half = take("bf16")
    if dtype == "bfloat16":
        result.put("model.dtype", "bfloat16", origin("dtype", "torch_dtype"))
    elif half:
        result.put("model.compute_dtype", "bfloat16", origin("bf16"))
    rank, alpha, modules = take("lora_r"), take("lora_alpha"), take("lora_target_modules")
    if take("use_peft"):
        lora = {"r": rank or 16, "alpha": alpha or 32, "target_modules": modules or "all-linear"}
        result.put(
            "model.lora", lora, origin("use_peft", "lora_r", "lora_alpha", "lora_target_modules")
        )
    trackers = take("report_to")
    if trackers not in (None, "none", "all"):
        names = [trackers] if isinstance(trackers, str) else list(trackers)
        result.put("run.trackers", names, origin("report_to"))
    if take("push_to_hub") and (name := take("hub_model_id")):
        result.put("run.push_to_hub", name, origin("push_to_hub", "hub_model_id"))


def _rewards(take: _Take, origin: _Origin, result: Imported) -> None:
    functions, weights, model = (
        take("reward_funcs"),
        take("reward_weights"),
        take("reward_model_path"),
    )
    entries: list[dict[str, Any]] = []
    for name in [functions] if isinstance(functions, str) else functions or []:
        kind = "path" if ":" in name else "model"
        dotted = "." in name and "/" not in name and ":" not in name
        entries.append({"path": ":".join(name.rsplit(".", 1))} if dotted else {kind: name})
    if model:
        entries.append({"model": model})
    for entry, weight in zip(entries, weights or [], strict=False):
        entry["weight"] = float(weight)
    if entries:
        result.put(
            "reward.functions",
            entries,
            origin("reward_funcs", "reward_weights", "reward_model_path"),
        )


def _engine(take: _Take, origin: _Origin, result: Imported) -> None:
    if (top_k := take("top_k")) and top_k > 0:
        result.unmapped.append(
            f"top_k: {top_k}  (it would bias the importance ratio; training uses all tokens)"
        )
    correction, mode = (
        take("vllm_importance_sampling_correction"),
        take("vllm_importance_sampling_mode"),
    )
    cap = take("vllm_importance_sampling_cap") or take("vllm_importance_sampling_clip_max")
    if take("use_vllm"):
        result.put("rollout.engine", "vllm", origin("use_vllm"))
        if correction is not False:
            result.put(
                "algorithm.mismatch",
                mode or "sequence_mask",
                origin("vllm_importance_sampling_mode"),
            )
            result.put(
                "algorithm.mismatch_high", cap or 3.0, origin("vllm_importance_sampling_cap")
            )
    if token := take("stop_token_id"):
        result.put("rollout.stop_token_ids", [token], origin("stop_token_id"))
    take("stop_token")  # eos, its only value, always ends a response here


def _grpo_loss(take: _Take, origin: _Origin, result: Imported) -> None:
    loss, level = take("loss_type"), take("importance_sampling_level")
    averages = {
        "grpo": "sequence_mean_token_mean",
        "dapo": "token_mean",
        "bnpo": "token_mean",
        "dr_grpo": "sequence_mean_token_sum_norm",
    }
    if level == "sequence":
        result.put("algorithm.name", "gspo", origin("importance_sampling_level"))
    elif loss == "cispo":
        result.put("algorithm.name", "cispo", origin("loss_type"))
    elif loss in averages:
        result.put("algorithm.aggregation", averages[loss], origin("loss_type"))
    else:
        raise ConfigError(
            f"loss_type {loss!r} has no counterpart here; known: {', '.join(averages)}, cispo"
        )
    scale = take("scale_rewards")
    if scale is not None:
        names = {True: "group", False: "none"}
        result.put("algorithm.scale", names.get(scale, scale), origin("scale_rewards"))
    high = take("epsilon_high")
    low = take("epsilon")
    if low is not None:
        result.put("algorithm.clip_low", low, origin("epsilon"))
    if high is not None or low is not None:
        result.put("algorithm.clip_high", high or low, origin("epsilon_high", "epsilon"))


def _ppo_terms(settings: Mapping[str, Any], take: _Take, origin: _Origin, result: Imported) -> None:
    clip = take("cliprange")
    result.put("algorithm.clip_low", clip, origin("cliprange"))
    result.put("algorithm.clip_high", clip, origin("cliprange"))
    # TRL trains policy and value model with one optimizer.
    result.put("critic.lr", settings["learning_rate"], origin("learning_rate"))
    result.put("critic.epochs", settings["num_ppo_epochs"], origin("num_ppo_epochs"))


def _complete(result: Imported) -> None:
    needed = {
        "model.name": "Hub id or folder",
        "data.name": "Hub id or file",
        "reward.functions": "for example [{path: reward_fns/gsm8k.py:reward}]",
        "run.steps": "training steps",
        "run.output": "folder of the run",
    }
    for path, meaning in needed.items():
        section, key = path.split(".")
        if key not in result.settings.get(section, {}):
            result.missing.append(f"{path}  ({meaning})")
