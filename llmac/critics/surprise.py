"""A critic that reads no text: what was the policy itself unsure of so far?

Where failures are tokens the policy sampled against its own better knowledge, their log-probabilities say where they
are, at no cost, while a language model with a value head would have to learn to check the work. It is blind to what
the policy gets wrong with confidence. Ours; no paper.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmac.core.masking import aggregate, aggregation_weight
from llmac.core.measures import Mean, Measure, combine
from llmac.core.surprise import FEATURES, surprise
from llmac.core.types import CriticTargets, Loss, Rollouts, Values
from llmac.core.value_heads import OUTSIDE, inside
from llmac.core.value_losses import binary_cross_entropy
from llmac.critics.bench import CriticBench
from llmac.critics.outcomes import mean_outcome
from llmac.critics.refusals import refuse_range, refuse_unless
from llmac.errors import CheckpointError
from llmac.models.packing import minibatches
from llmac.runtime.context import Runtime
from llmac.runtime.learner import Learner, Optimization
from llmac.runtime.saving import whole_weights

WEIGHTS_FILE, ABOUT_FILE = "surprise.safetensors", "surprise.json"

_STATE = "critic.json"


@dataclass(frozen=True, kw_only=True)
class SurpriseConfig(Optimization):
    """A small network on the policy's own log-probs of the tokens so far; learns the chance of success."""

    lr: float = 1e-2
    """Learning rate of AdamW; the network is small and new, so far above a language model's."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's moments; a fast second one, because the policy's log-probs change quickly at first."""
    width: int = 64
    """Of the one hidden layer."""
    epochs: int = 3
    """Passes over each step's rollouts."""
    minibatches: int = 4
    """Optimizer steps a pass."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Return of a failure and of a success; values lie between, and returns outside count as the nearer of the two."""
    init: str | None = None
    """Folder of a surprise critic that another run saved; null: start at the mean reward."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        super().__post_init__()
        refuse_range("reward_range", self.reward_range, "failure, success")
        for name in ("width", "epochs", "minibatches"):
            found = getattr(self, name)
            refuse_unless(found >= 1, f"{name} must be at least 1, found {found}")

    def build(self, bench: CriticBench) -> "Surprise":
        """The live critic: network and learner."""
        network = SurpriseNetwork(self.width)
        if self.init is not None:
            _load(network, Path(self.init))
        learner = Learner(
            network,
            self,
            bench.runtime,
            name="critic",
            total_steps=bench.steps * self.epochs * self.minibatches,
            before_learning=bench.before_learning,
        )
        return Surprise(network, learner, bench.runtime, self, fresh=self.init is None)


class SurpriseNetwork(nn.Module):
    """Features of states to logits of success: one hidden layer, its output 0 at the start.

    `offset` is no parameter: set to the logit of the mean reward, it makes the untrained critic say that everywhere.
    """

    offset: Tensor

    def __init__(self, width: int) -> None:
        """A network with `width` hidden units."""
        super().__init__()
        self.hidden = nn.Linear(FEATURES, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [b, T+1] of features [b, T+1, F], in float32."""
        with torch.autocast(features.device.type, enabled=False):
            hidden = torch.relu(self.hidden(features.to(self.hidden.weight.dtype)))
            return self.out(hidden).squeeze(-1).float() + self.offset


class Surprise:
    """A learning `Critic`; until it is first asked it knows nothing, and then it starts at the mean reward."""

    def __init__(
        self,
        network: SurpriseNetwork,
        learner: Learner,
        runtime: Runtime,
        config: SurpriseConfig,
        *,
        fresh: bool,
    ) -> None:
        """Put the parts together.

        Args:
            network: the module inside `learner`.
            learner: takes the optimizer steps.
            runtime: the process group.
            config: settings.
            fresh: the network was never trained.
        """
        self._network = network
        self._learner = learner
        self._runtime = runtime
        self._config = config
        self._fresh = fresh

    def values(self, rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> Values:
        """V(s_t) where `starts`, and V(s_T) for truncated rows."""
        if self._fresh:
            self._start_at(rollouts)
        low, high = self._config.reward_range
        (logits,) = self._learner.look(
            lambda module, features: module(features).cpu(), [self._features(rollouts)]
        )
        values = low + (high - low) * logits.sigmoid()
        lengths = torch.tensor([len(t.response_ids) for t in rollouts.trajectories])
        last = values.gather(1, lengths[:, None]).squeeze(1)
        return Values(
            at=values[:, :-1] * starts, starts=starts, bootstrap=last * rollouts.truncated
        )

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        """`epochs` passes of cross-entropy towards the returns."""
        metrics: dict[str, Measure] = {}
        for _ in range(self._config.epochs):
            for part, wanted in minibatches(rollouts, targets, self._config.minibatches):
                metrics = combine(metrics, self._step(part, wanted))
        return metrics

    def save(self, directory: Path) -> None:
        """Role `critic` of a checkpoint."""
        self._learner.save(directory)
        if self._runtime.is_main:
            (directory / _STATE).write_text(json.dumps({"fresh": self._fresh}))

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint; a network that started is not started again."""
        self._learner.load(directory)
        path = directory / _STATE
        # Older checkpoints have no such file.
        self._fresh = path.is_file() and bool(json.loads(path.read_text())["fresh"])

    def save_pretrained(self, directory: Path, *, policy: Path) -> None:
        """A folder for `init`. Collective; `policy` is not needed."""
        weights = whole_weights(self._network, keep=self._runtime.is_main)
        if self._runtime.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            save_file(dict(weights), directory / WEIGHTS_FILE)
            (directory / ABOUT_FILE).write_text(json.dumps({"width": self._config.width}))

    def _features(self, rollouts: Rollouts) -> Tensor:
        return surprise(
            rollouts.old_logprobs, rollouts.action_mask, length_limit=rollouts.length_limit
        ).to(self._runtime.device)

    def _start_at(self, rollouts: Rollouts) -> None:
        low, high = self._config.reward_range
        mean = mean_outcome(rollouts, self._runtime)
        if mean is None:  # nothing has ended yet
            return
        chance = min(max((mean - low) / (high - low), 0.01), 0.99)
        self._network.offset.fill_(math.log(chance / (1 - chance)))
        self._fresh = False

    def _step(self, rollouts: Rollouts, targets: CriticTargets) -> dict[str, Measure]:
        low, high = self._config.reward_range

        def loss_of(module: nn.Module, features: Tensor) -> Loss:
            returns, outside = inside(targets.returns, low, high)
            logits = module(features)[:, :-1].cpu()
            per_token = binary_cross_entropy(logits, (returns - low) / (high - low))
            total, weight = aggregate(per_token, targets.value_mask, "token_mean", horizon=1)
            return Loss(
                total=total,
                weight=weight,
                metrics={
                    "critic/vf_loss": Mean(total.detach(), weight),
                    OUTSIDE: Mean((outside & targets.value_mask).sum(), weight),
                },
            )

        return self._learner.update(
            [self._features(rollouts)],
            loss_of,
            aggregation_weight(targets.value_mask, "token_mean"),
        )


def _load(network: SurpriseNetwork, folder: Path) -> None:
    """Weights of another run's critic.

    Raises:
        CheckpointError: it is none, or one of another width.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"critic.init: {folder} has no {WEIGHTS_FILE}: it is not a surprise critic saved by llmac"
        )
    width = int(json.loads((folder / ABOUT_FILE).read_text())["width"])
    if width != network.hidden.out_features:
        raise CheckpointError(
            f"critic.init: {folder} has width {width}, and critic.width is {network.hidden.out_features}; "
            f"set critic.width: {width}"
        )
    network.load_state_dict(load_file(folder / WEIGHTS_FILE))
