"""Settings that all critics with a head on a language model share, and how such a critic is built."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Literal

from llmac.core.ensembles import Combination, Combine
from llmac.core.value_heads import Head
from llmac.critics.bench import CriticBench
from llmac.critics.head_critic import HeadCritic
from llmac.critics.head_start import starting_model
from llmac.critics.refusals import refuse_infinite, refuse_range, refuse_unless
from llmac.critics.target_network import TargetNetwork
from llmac.errors import ConfigError
from llmac.models.loading import torch_dtype, train_in_full_mode
from llmac.models.packing import PackedRows
from llmac.models.path_probe import settled
from llmac.models.value_heads import HeadSpec
from llmac.models.value_model import ValueModel
from llmac.runtime.learner import Learner, Optimization


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Optimization, ABC):
    """What every head critic can be told; a card adds what its head predicts."""

    lr: float = 1e-5
    """Learning rate of AdamW; ten times the policy's is usual (verl: 1e-5 against 1e-6)."""
    init: str = "policy"
    """Where the weights come from: `policy` (the starting policy), the folder of a saved critic with the same kind of
    head, a reward model (its trunk; its score is the first value if this head is scalar and linear), or any other Hub
    id or folder of a language model. With a shared trunk: `policy`, or a saved critic, whose head is taken."""
    trunk: Literal["own", "shared"] = "own"
    """A model of its own, or the policy's backbone with only the head added."""
    detach_trunk: bool = True
    """With a shared trunk: values do not move it (VL-DAC). False: the critic's optimizer moves it too."""
    lora: bool = False
    """Train low-rank adapters (the sizes of `model.lora`) on an own trunk instead of all its weights."""
    epochs: int = 1
    """Passes over each step's rollouts."""
    minibatches: int | None = None
    """Optimizer steps a pass; None = as many as the actor takes."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest return to expect; sizes the clip, the bounds or the support of the head."""
    hidden_layers: tuple[int, ...] | None = None
    """Widths of hidden layers between the trunk and the outputs, [3072, 2048] in VL-DAC; None: none for one head, one
    of a quarter of the trunk's width for several (SAFE)."""
    layer_norm: bool = False
    """Normalise what enters the head (SAFE does)."""
    activation: Literal["relu", "gelu"] = "relu"
    """Between hidden layers: ReLU in VL-DAC, GELU in SAFE."""
    heads: int = 1
    """Size of the ensemble: heads with different hidden layers and the same targets."""
    combine: Combine = "mean"
    """How they become one value: mean, min (TD3), soft_min (SAFE), or min_max, a weighted sum of both ends."""
    soft_min_temperature: float = 0.3
    """Of `soft_min`, unit of reward (SAFE: 0.3)."""
    min_weight: float = 0.75
    """Of the smallest in `min_max`; the rest goes to the largest."""
    target_tau: float | None = None
    """Values come from a copy that moves by this fraction towards the critic after each optimizer step (SAFE's code
    keeps one at 0.05, TD3's usual is 0.005); None: from the critic itself. Costs the memory of another model."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        super().__post_init__()
        refuse_range("reward_range", self.reward_range, "smallest, largest")
        refuse_infinite(self)
        refuse_unless(self.epochs >= 1, f"epochs must be at least 1, found {self.epochs}")
        refuse_unless(
            self.minibatches is None or self.minibatches >= 1,
            f"minibatches must be at least 1 or null (the actor's), found {self.minibatches}",
        )
        refuse_unless(
            all(width >= 1 for width in self.hidden_layers or ()),
            f"hidden_layers must be widths of at least 1, found {list(self.hidden_layers or ())}",
        )
        self._check_ensemble()
        tau = self.target_tau
        refuse_unless(
            tau is None or 0 < tau <= 1,
            f"target_tau must be above 0 and at most 1, or null (no copy), found {tau}",
        )
        refuse_unless(
            tau is None or self.trunk == "own" or self.detach_trunk,
            "target_tau with trunk: shared and detach_trunk: false would copy the policy's trunk; set "
            "detach_trunk: true or trunk: own",
        )

    def _check_ensemble(self) -> None:
        refuse_unless(self.heads >= 1, f"heads must be at least 1, found {self.heads}")
        refuse_unless(
            self.heads > 1 or self.combine == "mean",
            f"combine: {self.combine} needs several heads to combine, found heads: 1; set heads: 2",
        )
        refuse_unless(
            self.heads == 1 or self.hidden_layers != (),
            f"heads: {self.heads} with hidden_layers: [] would be the same head {self.heads} times, because linear "
            "heads start alike and are taught alike; give hidden_layers, or leave them out",
        )
        refuse_unless(
            self.soft_min_temperature > 0,
            f"soft_min_temperature must be positive, found {self.soft_min_temperature}",
        )
        refuse_unless(
            0 <= self.min_weight <= 1, f"min_weight must lie in [0, 1], found {self.min_weight}"
        )

    @abstractmethod
    def head(self) -> Head:
        """What the outputs mean."""

    @property
    def normalization(self) -> Literal["none", "running", "popart"]:
        """Whether the head learns returns divided by their running deviation."""
        return "none"

    @property
    def learns_together(self) -> bool:
        """Whether an ensemble learns by the loss of its one value, not by that of each head."""
        return False

    def without_effect(self) -> dict[str, str]:
        """Fields that do nothing as they are set, with the reason."""
        idle: dict[str, str] = {}
        if self.trunk == "own":
            idle["detach_trunk"] = "a trunk of its own is always trained; set trunk: shared"
        else:
            idle["lora"] = "a shared trunk is the policy's; set trunk: own"
        if self.combine != "soft_min":
            idle["soft_min_temperature"] = "it belongs to combine: soft_min"
        if self.combine != "min_max":
            idle["min_weight"] = "it belongs to combine: min_max"
        if self.heads == 1 and not self.hidden_layers:
            idle["activation"] = "there are no hidden layers; set hidden_layers"
        return idle

    def spec(self, width: int) -> HeadSpec:
        """The head on a trunk with hidden vectors of `width`."""
        hidden = self.hidden_layers
        if hidden is None:
            hidden = () if self.heads == 1 else (max(1, width // 4),)
        return HeadSpec(
            head=self.head(),
            heads=self.heads,
            combination=Combination(
                how=self.combine,
                temperature=self.soft_min_temperature,
                min_weight=self.min_weight,
            ),
            hidden_layers=hidden,
            layer_norm=self.layer_norm,
            activation=self.activation,
            normalized=self.normalization != "none",
        )

    def build(self, bench: CriticBench) -> HeadCritic:
        """The live critic: backbone, head, learner."""
        self._check_bench(bench)
        with bench.runtime.loading(torch_dtype(bench.model)):
            model, fresh_head = starting_model(self, bench)
        return self.around(model, bench, fresh_head=fresh_head)

    def around(self, model: ValueModel, bench: CriticBench, *, fresh_head: bool) -> HeadCritic:
        """The live critic of a value model that is there already.

        Args:
            model: with a head as `spec` says.
            bench: the parts of the run.
            fresh_head: it was never trained.
        """
        if self.trunk == "own":
            train_in_full_mode(
                model.backbone, gradient_checkpointing=bench.model.gradient_checkpointing
            )
        minibatches = self.minibatches or bench.minibatches
        packing = bench.packing_for(model.backbone)  # before it is copied
        target = None
        if self.target_tau is not None:
            target = TargetNetwork(
                model,
                bench.runtime,
                tau=self.target_tau,
                states=bench.policy_states if self.trunk == "shared" else None,
                compute_dtype=bench.compute_dtype,
            )
        learner = Learner(
            model,
            self,
            bench.runtime,
            name="critic",
            total_steps=bench.steps * self.epochs * minibatches,
            compute_dtype=bench.compute_dtype,
            before_learning=bench.before_learning,
        )
        ask = bench.prompt_states or bench.policy_states
        if self.trunk == "own":
            ask = partial(_show, learner)
        packing = settled(packing, [model.backbone], ask, bench.runtime)
        return HeadCritic(
            model,
            learner,
            bench.runtime,
            self,
            packing=packing,
            minibatches=minibatches,
            fresh_head=fresh_head,
            target=target,
        )

    def _check_bench(self, bench: CriticBench) -> None:
        alone = bench.runtime.world_size == 1 and not bench.runtime.shards
        if self.trunk == "shared" and not self.detach_trunk and not alone:
            raise ConfigError(
                "critic.detach_trunk: false with critic.trunk: shared works in one process without DeepSpeed only, "
                "because two optimizers would own the same weights; set detach_trunk: true or trunk: own"
            )
        if self.target_tau is not None and bench.runtime.shards:
            raise ConfigError(
                "critic.target_tau needs whole weights on every process, and this run cuts them into shards; set "
                "target_tau: null, or launch with recipes/accelerate/ddp.yaml"
            )
        if self.normalization == "popart" and bench.runtime.shards:
            raise ConfigError(
                "critic.normalize: popart rewrites the head's weights, and this run cuts them and the optimizer's "
                "copies into shards; set normalize: running, or launch with recipes/accelerate/ddp.yaml"
            )


def _show(learner: Learner, rows: PackedRows) -> None:
    learner.look(lambda module, r: module(r), [rows], beside_engine=True)
