"""The module that is trained: a causal language model that answers with log-probabilities of given responses."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmac.errors import ConfigError
from llmac.models.loading import LanguageModel
from llmac.models.logprobs import token_logprobs
from llmac.models.packing import PackedRows

logger = logging.getLogger(__name__)


class TokenPolicy(nn.Module):
    """A Hugging Face causal language model, asked for log-probabilities instead of logits.

    The model itself stays reachable as `model`, with its own parameter names: nothing is saved or sent to an engine
    under a wrapper's names.
    """

    def __init__(self, model: LanguageModel, *, temperature: float, chunk_mb: float) -> None:
        """Wrap `model`.

        Args:
            model: any causal language model, with or without a peft adapter.
            temperature: what the rollout engine divides its logits by.
            chunk_mb: bound on one chunk of logits, MiB.
        """
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.chunk_mb = chunk_mb
        self.vocabulary = int(_output_layer(causal_lm(model)).weight.shape[0])
        self.chunked = _projects_like_its_own_forward(self)

    def forward(
        self,
        rows: PackedRows,
        *,
        entropy_gradient: bool = False,
        temperature: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities [b, T], entropies [b, T]) of the tokens the policy sampled; 0 elsewhere."""
        mask = rows.action_mask
        states = rows.states[:, : mask.shape[1]][mask]
        chosen, entropy = token_logprobs(
            self._hidden(rows.input_ids)[states],
            rows.response_ids[mask],
            self._project if self.chunked else nn.Identity(),
            vocabulary=self.vocabulary,
            temperature=self.temperature if temperature is None else temperature,
            chunk_mb=self.chunk_mb,
            entropy_gradient=entropy_gradient,
        )
        blank = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return blank.masked_scatter(mask, chosen), blank.masked_scatter(mask, entropy)

    def _hidden(self, input_ids: Tensor) -> Tensor:
        """Last hidden vectors, flattened [b * L, H]; logits [b * L, V] for a model that cannot be split."""
        language_model = causal_lm(self.model)
        if self.chunked:
            states = language_model.base_model(
                input_ids=input_ids, use_cache=False
            ).last_hidden_state
        else:
            states = language_model(input_ids=input_ids, use_cache=False).logits
        return states.flatten(0, 1)

    def _project(self, hidden: Tensor) -> Tensor:
        language_model = causal_lm(self.model)
        logits = _output_layer(language_model)(hidden)
        cap = getattr(
            language_model.config, "final_logit_softcapping", None
        )  # Gemma's; absent elsewhere
        return logits if cap is None else torch.tanh(logits / cap) * cap


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside an optional peft wrapper, adapters in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def _output_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns hidden vectors into logits."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise ConfigError(
            f"{type(model).__name__} has no output layer; model.name must be a causal language model"
        )
    return cast(nn.Linear, layer)


@torch.no_grad()
def _projects_like_its_own_forward(policy: TokenPolicy) -> bool:
    """Whether backbone + output layer give the model's own logits; some architectures scale or cap in between."""
    language_model = causal_lm(policy.model)
    policy.chunked = True
    device = language_model.device
    probe = torch.arange(4, device=device)[None] % policy.vocabulary
    with _evaluating(language_model):
        own = language_model(input_ids=probe, use_cache=False).logits.flatten(0, 1).float()
        try:
            split = policy._project(policy._hidden(probe)).float()
        except (AttributeError, TypeError) as reason:
            logger.info(
                "%s has no separate backbone (%s); its logits are not chunked",
                type(language_model).__name__,
                reason,
            )
            return False
    if torch.allclose(own, split, rtol=1e-3, atol=1e-3 * float(own.abs().max().clamp(min=1.0))):
        return True
    logger.info(
        "%s changes its logits after the output layer; they are not chunked",
        type(language_model).__name__,
    )
    return False


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
