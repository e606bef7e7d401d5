"""What a recipe may say: one frozen model per owner, every field with its meaning, unit and default.

Keys of `algorithm:` and `critic:` are not here. They are the fields of the chosen card
(`cards.py`), next to the
formula that uses them.
"""

import os
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationInfo,
    field_validator,
)

from llmac.config.cards import Choice, choose_algorithm, choose_critic
from llmac.config.guards import is_list, is_mapping, is_sequence
from llmac.errors import ConfigError

Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Numbers = Annotated[tuple[int, ...], Field(strict=False)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A Hub id or a path; a shell leaves the ~ of `key=~/folder` to us."""


def _list_to_tuple(value: object) -> object:
    return tuple(value) if is_list(value) else value


class Section(BaseModel):
    """A part of a recipe: unknown keys and wrong types are errors, and nobody writes to it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )


class LoraConfig(Section):
    """Low-rank adapters instead of full weights (Hu et al. 2021, arXiv:2106.09685)."""

    r: Count = 16
    """Rank of the update."""
    alpha: Count = 32
    """The update is scaled by alpha / r. There is no dropout: the policy that learns must be the
    one that sampled."""
    target_modules: str | list[str] = "all-linear"
    """Names of the adapted modules, or all-linear: every linear layer except the output head."""


class ModelConfig(Section):
    """The language model that is trained."""

    name: Place
    """Hub id or local folder, as `from_pretrained` takes it."""
    tokenizer: Place | None = None
    """Hub id or folder of the tokenizer; null: the model's."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null: the main branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained parameters and the optimizer's state. At RL learning rates bfloat16 rounds
    small steps away."""
    compute_dtype: Literal["bfloat16"] | None = None
    """bfloat16: forward and backward under autocast, parameters stay in `dtype`; null: compute in
    `dtype`."""
    trust_remote_code: bool = False
    """Run model code shipped with the checkpoint."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention implementation; null: the model's own default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    lora: LoraConfig | None = None
    """Train adapters only; null: train all weights."""
    reference: Place | None = None
    """Hub id or folder of the reference policy of KL terms; null: the policy as it starts."""
    logprob_chunk_mb: Count = 256
    """Largest block of logits, megabytes: log-probabilities are computed chunk by chunk, about four blocks alive."""


class DataConfig(Section):
    """A dataset and how a row becomes a prompt."""

    name: Place
    """Hub id, a .jsonl, .json, .parquet or .csv file, or a `save_to_disk` folder."""
    subset: str | None = None
    """Configuration of the dataset on the Hub (gsm8k: main)."""
    split: str = "train"
    """Split to read."""
    prompt: str | None = None
    """Template over the row's columns, such as "{question}\\nAnswer:"; null: take `prompt_column`
    as it is."""
    prompt_column: str | None = None
    """Column that holds the prompt, a string or chat messages; null: guessed from common names and
    printed."""
    system: str | None = None
    """System message put before the prompt when the chat template is used."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Apply the tokenizer's chat template: auto does for rows of messages or when `system` is
    given."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames, new name: old name; dots reach into nested columns (solution:
    reward_model.ground_truth)."""
    max_prompt_tokens: Count | None = None
    """Longest prompt, tokens; null: what the model's context leaves after max_new_tokens."""
    on_too_long: Literal["error", "skip"] = "error"
    """A longer prompt stops the run, or is left out and counted."""
    limit: Count | None = None
    """Use the first rows only; null: all."""
    shuffle: bool = True
    """A new seeded order each epoch; false: the order of the file."""


class RewardFunctionConfig(Section):
    """One reward function."""

    path: str | Callable[..., Any] | None = None
    """path/to/file.py:function or package.module:function; from Python, the function itself."""
    model: Place | None = None
    """Hub id or folder of a sequence-classification model with one output, instead of `path`."""
    name: str | None = None
    """In metrics: reward/<name>/mean; null: the function's or the model's own name."""
    weight: float = 1.0
    """The reward is the weighted sum of the functions that apply; negative weights punish."""
    adapter: Literal["auto", "trl", "one", "verl", "openrlhf"] = "auto"
    """Signature: trl = batch, one = (prompt, response, **columns), verl, openrlhf; auto tells trl
    from one by names."""


class RewardConfig(Section):
    """Who judges the responses. Short forms: one path, or a list of paths."""

    functions: Annotated[
        tuple[RewardFunctionConfig, ...], BeforeValidator(_list_to_tuple), Field(min_length=1)
    ]
    """The functions whose weighted sum is the reward."""
    on_error: Literal["stop", "skip"] = "stop"
    """A function that raises stops the run with the prompt's id, or that reward is None and
    counted."""
    zero_warning_steps: Count = 10
    """Warn by name when a function has given nothing but 0 for this many steps."""


class ActorConfig(Section):
    """How the policy learns."""

    lr: Positive = 1e-6
    """Peak learning rate of AdamW. LoRA wants about ten times the value for full weights."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: keep lr, or decay it to min_lr_ratio * lr at run.steps."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps of linear warm-up: the first is made at lr / warmup_steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where a decaying schedule ends, as a fraction of lr."""
    weight_decay: PositiveOrZero = 0.0
    """Decoupled weight decay of AdamW."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    """Gradients are scaled down to this norm; .inf: never."""
    prompts_per_step: Count = 64
    """Prompts of one step, over all processes; each gets algorithm.group_size responses."""
    epochs: Count = 1
    """Passes over the responses of a step. Above 1 the ratio moves away from 1 and clipping begins
    to act."""
    minibatches: Count = 1
    """Optimizer steps a pass is cut into."""
    max_tokens_per_microbatch: Count = 16384
    """Tokens in one forward pass on one device. Changes speed and memory, never the gradient."""
    packing: Literal["auto", "trie", "varlen", "padded"] = "auto"
    """trie: responses that begin alike are computed once where they do; varlen: side by side without padding;
    padded: to the longest; auto: trie where it saves a fifth of the padded tokens, else padded; padded on CUDA, where
    tries were never measured, and where a model turns out not to see what rows share. Changes speed and memory, never
    the gradient."""


class RolloutConfig(Section):
    """Who samples, and how."""

    engine: Literal["hf", "vllm", "vllm_server"] = "hf"
    """hf: transformers in process, CPU or GPU; vllm: vLLM in process, sharing the trainer's device; vllm_server:
    `vllm serve` processes, here or on other machines."""
    temperature: Positive = 1.0
    """Logits are divided by it, in sampling and in training alike."""
    top_p: Fraction = 1.0
    """Must be 1 in training; evaluation is greedy or at its own temperature."""
    top_k: CountOrZero = 0
    """Must be 0 in training."""
    max_new_tokens: Count = 512
    """Response length, tokens, at which sampling is cut."""
    stop: Strings = ()
    """Strings that end a response; the token completing one is kept."""
    stop_token_ids: Numbers = ()
    """Token ids that end a response, besides the tokenizer's end of sequence."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """vLLM's weights; auto: model.compute_dtype, else model.dtype."""
    max_model_len: Count | None = None
    """vLLM's context, tokens; null: the longest prompt and response of the run (`llmac serve`: the model's)."""
    gpu_memory_utilization: Fraction = 0.3
    """Fraction of the GPU that vLLM may take, weights and cache; the trainer has the rest. Servers take 0.9."""
    kv_cache_mb: Count | None = None
    """vLLM's cache in megabytes, instead of what gpu_memory_utilization leaves."""
    enforce_eager: bool = False
    """No CUDA graphs in vLLM: faster start, slower decoding."""
    tensor_parallel_size: Count = 1
    """GPUs one vLLM engine spans. With engine: vllm, that many neighbouring processes share an engine."""
    sleep_level: Literal[0, 1, 2] = 1
    """What vLLM in process gives back while the policy learns (GPU only): 0 nothing; 1 cache, weights to main memory;
    2 weights too, tried out at the start and re-sent on waking."""
    sync_bucket_mb: Count = 512
    """Weights are gathered and sent in buckets of this size, megabytes: the memory a sync takes above the shards."""
    servers: Strings = ()
    """URLs of servers that `llmac serve` started, such as http://host:8000; empty: server_count are started here."""
    server_count: Count = 1
    """vLLM servers to start on this machine when `servers` is empty."""
    weight_transport: Literal["auto", "shm", "tcp", "nccl"] = "auto"
    """How weights reach a server: shared memory, a socket, or NCCL; auto: shm on one machine, else tcp."""
    request_timeout_seconds: Positive = 600.0
    """Longest wait for one response of a server; then it counts as dead and its requests go elsewhere."""
    max_num_seqs: Count = 256
    """Responses decoded at a time; lower it when sampling runs out of memory."""
    probe_every: Count = 50
    """Weight updates between two proofs that the engine holds the policy's weights; the first is
    always proved."""


class EvaluationConfig(Section):
    """Held-out evaluation during training. Leave the section out for none."""

    data: DataConfig
    """The held-out set; same keys as `data`."""
    every: Count = 20
    """Training steps between evaluations."""
    samples: Count = 1
    """Responses per prompt; pass@k is reported for every power of two up to it."""
    temperature: PositiveOrZero = 0.0
    """0 = greedy."""
    max_new_tokens: Count | None = None
    """Response length, tokens; null: rollout.max_new_tokens."""
    solved_at: float = 1.0
    """Total reward from which a response counts as solved in pass@k; lower it where the best reward is below 1."""
    at_start: bool = True
    """Also before the first step: the number every later one is compared with."""


class RunConfig(Section):
    """How long, where to, and what is kept."""

    steps: Count
    """Training steps: sample, judge, learn, sync."""
    output: Place
    """Folder of this run: metrics.jsonl, completions, checkpoints, final model."""
    critic_warmup_steps: CountOrZero = 0
    """First steps in which only the critic learns."""
    critic_warmup_explained: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Only the critic learns until its explained variance of a step reaches this; null: no such condition."""
    policy_every: Count = 1
    """After the warm-up the policy learns in one step of this many, the critic in all (TD3's delayed updates)."""
    save_every: Count = 50
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Count = 2
    """Checkpoints kept."""
    seed: CountOrZero = 0
    """Of prompt order, sampling and initialisation."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: from the latest checkpoint in output if there is one; must: and it is an error if not;
    never: refuse."""
    log_completions_every: Count = 10
    """Steps between tables of sampled responses with rewards."""
    trackers: Strings = ()
    """accelerate's trackers by name: tensorboard, wandb, trackio, ... metrics.jsonl is always
    written."""
    project: str = "llmac"
    """Project name shown by the trackers."""
    watchdog_seconds: Positive = 1800.0
    """Longest time a phase may take; then the run ends, naming rank and phase."""
    ratio_tolerance: Positive = 0.02
    """Largest mean |log ratio| on the first micro-batch of an on-policy step, 0 up to rounding;
    above it the run stops."""
    push_to_hub: str | None = None
    """Hub repository the final model is pushed to; null: none."""


def reward_short_forms(value: object) -> object:
    """`path`, `[path, ...]` and `{path | model, ...}` mean `{functions: [...]}`."""
    if isinstance(value, str) or callable(value):
        value = [value]
    if is_sequence(value):
        value = {"functions": list(value)}
    elif is_mapping(value) and "functions" not in value and {"path", "model"} & set(value):
        value = {"functions": [value]}
    if is_mapping(value) and is_sequence(value.get("functions")):
        functions = [
            {"path": f} if isinstance(f, str) or callable(f) else f for f in value["functions"]
        ]
        value = {**value, "functions": functions}
    return value


class Recipe(Section):
    """Everything one training run is made of."""

    model: ModelConfig
    """The language model that is trained."""
    data: DataConfig
    """The prompts."""
    reward: Annotated[RewardConfig, BeforeValidator(reward_short_forms)]
    """Who judges the responses."""
    algorithm: Annotated[InstanceOf[Choice], BeforeValidator(choose_algorithm)]
    """The card: `name` and the fields of its dataclass."""
    critic: InstanceOf[Choice] | None = Field(default=None, validate_default=True)
    """Who says V(s): `name` and its fields; null: the card's default critic, or none where it uses
    none."""
    actor: ActorConfig = Field(default_factory=ActorConfig)
    """How the policy learns."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """Who samples, and how."""
    evaluation: EvaluationConfig | None = None
    """Held-out evaluation; null: none."""
    run: RunConfig
    """How long, where to, and what is kept."""

    @field_validator("critic", mode="before")
    @classmethod
    def _critic_of_the_algorithm(cls, value: object, info: ValidationInfo) -> object:
        algorithm = info.data.get("algorithm")
        if (
            algorithm is None
        ):  # already reported, and nothing can be said about the critic without it
            return None
        return choose_critic(value, algorithm)

    @field_validator("run")
    @classmethod
    def _output_is_a_folder_name(cls, run: RunConfig) -> RunConfig:
        if not run.output.strip():
            raise ConfigError(
                "run.output is empty; name the folder of this run, for example runs/first"
            )
        return run
