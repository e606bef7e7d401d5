"""A critic that thinks before it says a value: settings of a language model that writes about a state, then a score.

GenAC: arXiv:2604.10701. It reads instructions, what is known of the writer, the problem and the response up to the
state, writes as it likes, and ends with a whole number between tags. What is sure of the paper and what is our reading
of it stands in docs/critics.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmac.core.protocols import Encode, Player, Resendable
from llmac.core.scores import Baseline
from llmac.critics.bench import CriticBench, PolicyOrder, TrainedPolicy
from llmac.critics.generative_context import Conditioning, Context, contexts
from llmac.critics.generative_critic import SETTINGS_FILE, TEMPLATE_FILE, Generative
from llmac.critics.generative_engine import CriticEngine
from llmac.critics.generative_learning import ScoreLearner
from llmac.critics.generative_prompt import NOTHING_TOLD, CriticTemplate, critic_prompt
from llmac.critics.refusals import refuse_infinite, refuse_range, refuse_unless
from llmac.errors import ConfigError, DataError
from llmac.models.loading import ModelSpec, context_length
from llmac.runtime.learner import Optimization

_LEARNING = (
    *("lr", "schedule", "warmup_steps", "min_lr_ratio", "weight_decay", "betas", "eps"),
    *("max_grad_norm", "epochs", "minibatches", "max_tokens_per_microbatch", "baseline"),
    *("importance_cap", "sync_every"),
)
MEANING = ("scale", "tag", "reward_range", "conditioning")
"""Settings without which a trained critic's words mean something else."""
ASKING = (
    *MEANING,
    *(
        "actor",
        "attempts",
        "attempt_tokens",
        "unparsed_value",
        "max_new_tokens",
        "max_prompt_tokens",
    ),
    *("temperature", "samples"),
)
"""How it is asked: what is saved beside the weights, so that it can be asked again."""


@dataclass(frozen=True, kw_only=True)
class GenerativeConfig(Optimization):
    """A language model writes about each state and ends with a score; it learns by the outcomes.

    Memory beside the policy's, with P parameters in the critic: weights, gradients and AdamW's moments of the learner,
    16 P bytes in float32, and with `engine: own` an engine with weights and keys and values of its own; with `engine:
    shared` none of the latter, but weights travel to the policy's engine and back each step.
    """

    init: str = "policy"
    """Where the weights come from: `policy` (the model the run starts from, adapters left out), the folder of a saved
    generative critic, or any other Hub id or folder of a causal language model. It has its own tokenizer."""
    template: str | None = None
    """Jinja file of the prompt; see `generative_prompt.VARIABLES`. None: the one that `init` was saved with, else the
    packaged `llmac/critics/templates/genac.jinja`."""
    conditioning: Conditioning = "success_rate"
    """What it is told of the writer, always of earlier steps. success_rate: how often it succeeds lately, with tokens
    used and left, as GenAC was re-implemented; attempts: some of its responses with their outcomes; both; or none."""
    actor: str = "a language model"
    """What the writer is called in the prompt."""
    success_rate_memory: float = 0.9
    """How much of the success rate stays from step to step."""
    attempts: int = 4
    """Responses of the last step that it is shown. Our choice."""
    attempt_tokens: int = 256
    """Tokens of each, after which it is cut. Our choice."""
    scale: tuple[int, int] = (0, 10)
    """Smallest and largest score."""
    tag: str = "answer"
    """Name of the tags around the score; what is written ends with the closing one."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Outcomes that the ends of the scale stand for; what is outside counts as the nearer of the two."""
    unparsed_value: float | None = None
    """Value of a state about which no score was written, unit of reward. None: the low end of `reward_range`."""
    max_new_tokens: int = 1024
    """Tokens after which what it writes is cut."""
    max_prompt_tokens: int | None = None
    """States whose prompt is longer are not asked about and have `unparsed_value`. None: as many as its context holds
    beside `max_new_tokens`; where `rollout.max_model_len` is smaller than that, say how many fit."""
    temperature: float = 1.0
    """Logits are divided by it; 0, the likeliest token, only where it does not learn."""
    samples: int = 1
    """Texts written about each state, whose scores are averaged; those without one are left out of the average."""
    engine: Literal["own", "shared"] = "own"
    """own: an engine beside the policy's. shared: the policy's engine gets the critic's weights while values are asked;
    architecture and tokenizer must be the policy's."""
    sync_every: int = 1
    """Updates after which its own engine gets new weights; 5 where GenAC's critic was trained before the run. A run
    that is resumed between two times asks newer weights than it would have."""
    learns: bool = True
    """False: it stays as it is, and needs no memory but its engine's."""
    lr: float = 1e-6
    """Learning rate of AdamW."""
    epochs: int = 1
    """Passes over what was written in a step."""
    minibatches: int = 1
    """Optimizer steps a pass."""
    max_tokens_per_microbatch: int | None = None
    """Tokens of a micro-batch, prompts included; None: as the actor's."""
    baseline: Baseline = "none"
    """What the reward of a score is compared with: nothing, as in GenAC; the other scores about the same problem in
    the step; or those among them whose outcome was as good."""
    importance_cap: float | None = 2.0
    """Largest weight π_train/μ of a token, the trainer's over the sampler's probability; None: no weights."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, and a saved critic whose scores mean something else."""
        super().__post_init__()
        refuse_range("reward_range", self.reward_range, "failure, success")
        refuse_infinite(self)
        for name in (
            *("success_rate_memory", "attempts", "attempt_tokens", "max_new_tokens", "samples"),
            *("sync_every", "epochs", "minibatches"),
        ):
            low, found = (0 if name == "success_rate_memory" else 1), getattr(self, name)
            refuse_unless(found >= low, f"{name} must be at least {low}, found {found}")
        for name in ("max_prompt_tokens", "max_tokens_per_microbatch", "importance_cap"):
            found = getattr(self, name)
            refuse_unless(
                found is None or found > 0, f"{name} must be above 0, or null, found {found}"
            )
        refuse_unless(
            self.success_rate_memory < 1,
            f"success_rate_memory must be below 1, found {self.success_rate_memory}: the first step would stay",
        )
        refuse_unless(
            self.scale[0] < self.scale[1],
            f"scale must be (smallest, largest), ascending, found {self.scale}",
        )
        refuse_unless(
            self.tag.replace("_", "").replace("-", "").isalnum(),
            f"tag must be a name of letters, digits, - and _, without brackets, found {self.tag!r}",
        )
        refuse_unless(
            self.temperature > 0 or (self.temperature == 0 and not self.learns),
            f"temperature must be above 0, found {self.temperature}; a critic with learns: false may have 0",
        )
        refuse_unless(
            self.temperature > 0 or self.samples == 1,
            f"samples is {self.samples} at temperature 0, where all are the same; set samples: 1, or a temperature",
        )
        refuse_unless(
            self.learns or self.engine == "own",
            "engine: shared sends the learner's weights to the policy's engine, and with learns: false there is no "
            "learner; set engine: own",
        )
        CriticTemplate(self.template_file)
        self._check_saved()

    @property
    def writes_prompts(self) -> bool:
        """Whether the policy's engine needs room for what it reads."""
        return self.engine == "shared"

    @property
    def template_file(self) -> str | None:
        """Of the prompt; None: the packaged one."""
        saved = Path(self.init).expanduser() / TEMPLATE_FILE
        if self.template is None and self.init != "policy" and saved.is_file():
            return str(saved)
        return self.template

    def without_effect(self) -> dict[str, str]:
        """Fields that do nothing as they are set, with the reason."""
        idle: dict[str, str] = {}
        if self.conditioning not in ("success_rate", "both"):
            idle["success_rate_memory"] = "no success rate is told; set conditioning: success_rate"
        if self.conditioning not in ("attempts", "both"):
            reason = "no attempts are shown; set conditioning: attempts"
            idle |= {"attempts": reason, "attempt_tokens": reason}
        if not self.learns:
            idle |= dict.fromkeys(_LEARNING, "the critic stays as it is; set learns: true")
        elif self.engine == "shared":
            idle["sync_every"] = "the policy's engine gets the critic's weights every time"
        return idle

    def build(self, bench: CriticBench) -> Generative:
        """The live critic: learner, engine, prompt.

        Raises:
            ConfigError: nothing can be sampled, servers sample, the model's context is too small, or its architecture
                is not that of the policy whose engine it is to share.
        """
        if bench.player is None or bench.new_player is None or bench.model_named is None:
            raise ConfigError(
                "critic generative writes about states, and here nothing is sampled; train it by the recipes of its "
                "stages (docs/critics.md), or choose a value model, for example critic: {name: value_head}"
            )
        if isinstance(bench.engine, Resendable):
            raise ConfigError(
                "critic generative needs an engine that takes the weights of two models, or a second one, and "
                "rollout.engine is vllm_server, whose servers have the policy; set rollout.engine: vllm or hf"
            )
        spec = bench.model_named(bench.model.name if self.init == "policy" else self.init)
        most = self.most_prompt_tokens(spec, bench.model)
        policy = None if not self.learns else self._policy(spec, bench)
        if self.engine == "shared":
            player = bench.player
        else:
            longest = self.max_prompt_tokens and self.max_prompt_tokens + self.max_new_tokens
            player = bench.new_player(spec.name, longest)
        return Generative(
            self,
            template=CriticTemplate(self.template_file),
            context=self._context(bench, bench.player),
            writer=bench.player,
            player=player,
            voice=CriticEngine(
                player.engine,
                policy,
                shared=self.engine == "shared",
                every=self.sync_every,
                check=bench.check_engine,
            ),
            policy=policy,
            learner=None
            if policy is None
            else ScoreLearner(
                policy,
                bench.runtime,
                baseline=self.baseline,
                importance_cap=self.importance_cap,
                length_limit=self.max_new_tokens,
            ),
            runtime=bench.runtime,
            spec=spec,
            seed=bench.seed,
            most_prompt_tokens=most,
            values_ends=bench.values_ends,
        )

    def most_prompt_tokens(self, critic: ModelSpec, policy: ModelSpec) -> int | None:
        """Tokens of the longest prompt that it is asked about; None: no limit is known.

        Args:
            critic: its model.
            policy: the policy's, whose engine it may share, with that engine's context.

        Raises:
            ConfigError: a context has no room for it beside what is written.
        """
        specs = (critic, policy) if self.engine == "shared" else (critic,)
        known = [(context_length(spec), spec.name) for spec in specs]
        lengths = [(length, name) for length, name in known if length is not None]
        if not lengths:
            return self.max_prompt_tokens
        whole, name = min(lengths)
        room = whole - self.max_new_tokens
        wanted = self.max_prompt_tokens or max(room, 1)
        if room < wanted:
            raise ConfigError(
                f"critic.max_new_tokens is {self.max_new_tokens} beside prompts of {wanted} tokens, and the context of "
                f"{name} has {whole}; lower critic.max_new_tokens or critic.max_prompt_tokens"
            )
        return wanted

    def check_room(self, critic: ModelSpec, policy: ModelSpec, encode: Encode) -> None:
        """Refuse settings with which no state could be asked about.

        Args:
            critic: its model.
            policy: the policy's.
            encode: the critic's.

        Raises:
            ConfigError: a context is too small, or the template alone fills it.
        """
        most = self.most_prompt_tokens(critic, policy)
        told = dict(NOTHING_TOLD)
        if self.conditioning in ("success_rate", "both"):
            told |= {"tokens_used": 0, "tokens_left": 0}
        template = CriticTemplate(self.template_file)
        bare = critic_prompt(template, self, problem="", partial="", told=told)
        try:
            tokens = len(encode(bare))
        except DataError:  # not a token of its own
            tokens = 0
        if most is not None and tokens >= most:
            raise ConfigError(
                f"critic generative reads prompts of at most {most} tokens, and its template has {tokens} without "
                "problem and response: no state would be asked about; raise critic.max_prompt_tokens, lower "
                "critic.max_new_tokens, or set critic.template to a shorter one"
            )

    def asking(self) -> dict[str, Any]:
        """What is saved beside the weights, as JSON has it."""
        return json.loads(json.dumps({name: getattr(self, name) for name in ASKING}))

    def _policy(self, spec: ModelSpec, bench: CriticBench) -> TrainedPolicy:
        if bench.new_policy is None:
            raise ConfigError(
                "critic generative has no learner here; set critic.learns: false to ask it as it is"
            )
        order = PolicyOrder(
            name="critic",
            model=spec,
            optimization=Optimization.of(self),
            epochs=self.epochs,
            minibatches=self.minibatches,
            max_tokens_per_microbatch=self.max_tokens_per_microbatch
            or bench.max_tokens_per_microbatch,
            packing=bench.packing,
            temperature=self.temperature,
            optimizer_steps=bench.steps * self.epochs * self.minibatches,
        )
        return bench.new_policy(order)

    def _context(self, bench: CriticBench, writer: Player) -> Context:
        context = contexts(self, bench.runtime, writer.read)
        saved = self._saved()
        if saved is not None:
            context.restore(saved["context"])
        return context

    def _saved(self) -> Mapping[str, Any] | None:
        """What was saved beside the weights of a generative critic; None: these are of something else."""
        if self.init == "policy":
            return None
        file = Path(self.init).expanduser() / SETTINGS_FILE
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    def _check_saved(self) -> None:
        saved = self._saved()
        if saved is None:
            return
        apart = [
            f"critic.{name}: {json.dumps(saved[name])} (now {json.dumps(mine)})"
            for name, mine in self.asking().items()
            if name in MEANING and saved[name] != mine
        ]
        refuse_unless(
            not apart,
            f"the critic in {self.init} has learned to write other scores than it is asked for; set {', '.join(apart)}",
        )
