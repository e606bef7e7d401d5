"""The module that is trained: a causal language model that answers with log-probabilities of given responses."""

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmac.errors import ConfigError
from llmac.models.loading import LanguageModel
from llmac.models.logprobs import Projection, token_logprobs
from llmac.models.packing import PackedRows
from llmac.models.path_probe import PathProbe, evaluating

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
        self.vocabulary = int(_output_layer(causal_lm(model)).out_features)
        self._chunked: bool | None = None
        self._probe = PathProbe()

    def forward(
        self,
        rows: PackedRows,
        *,
        entropy_gradient: bool = False,
        temperature: float | None = None,
        hidden_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities [b, T], entropies [b, T]) of the tokens the policy sampled; 0 elsewhere.

        With `hidden_only` instead (the backbone's hidden vectors, flattened [b * L, H]; an empty tensor): for a critic
        on this trunk, which must come in by the front door where the weights are sharded.
        """
        # Here and not earlier: a sharded model has its weights only inside its forward pass.
        if self._chunked is None:
            self._chunked = _projects_like_its_own_forward(self, rows.input_ids.device)
        self._probe(
            causal_lm(self.model),
            rows,
            lambda probe: self._hidden(probe.inputs(), split=self._chunked is True),
            vocabulary=self.vocabulary,
        )
        if hidden_only:
            hidden = self._hidden(rows.inputs(), split=True)
            return hidden, hidden.new_empty(0)
        mask = rows.action_mask
        # Rows with a state and a token in common ask about them once.
        nodes, place = rows.states[:, 1:][mask].unique(return_inverse=True)
        states = torch.empty_like(nodes).scatter_(0, place, rows.states[:, :-1][mask])
        hidden = self._hidden(rows.inputs(), split=self._chunked).index_select(0, states)

        def chosen_by(project: Projection) -> tuple[Tensor, Tensor]:
            return token_logprobs(
                hidden,
                rows.input_ids.flatten()[nodes],
                project,
                vocabulary=self.vocabulary,
                temperature=self.temperature if temperature is None else temperature,
                chunk_mb=self.chunk_mb,
                entropy_gradient=entropy_gradient,
            )

        if self._chunked:
            layer = _output_layer(causal_lm(self.model))
            chosen, entropy = _inside(
                layer, hidden, lambda logits_of: chosen_by(lambda h: self._capped(logits_of(h)))
            )
        else:
            chosen, entropy = chosen_by(nn.Identity())
        blank = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        chosen, entropy = chosen.index_select(0, place), entropy.index_select(0, place)
        return blank.masked_scatter(mask, chosen), blank.masked_scatter(mask, entropy)

    def _hidden(self, inputs: dict[str, Any], *, split: bool) -> Tensor:
        """Last hidden vectors, flattened [b * L, H]; logits [b * L, V] unless the model can be `split`."""
        language_model = causal_lm(self.model)
        if split:
            return language_model.base_model(**inputs).last_hidden_state.flatten(0, 1)
        return language_model(**inputs).logits.flatten(0, 1)

    def _capped(self, logits: Tensor) -> Tensor:
        config = causal_lm(self.model).config
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma's; absent elsewhere
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _inside(
    layer: nn.Module, hidden: Tensor, work: Callable[[Projection], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Call `layer` once, and let `work` use its own forward as often as it likes meanwhile.

    Where weights are sharded, calling a layer fetches its weights from all ranks. The number of chunks depends on the
    rows of a rank, so that a call for each chunk would leave ranks waiting for each other.
    """
    own = layer.forward
    layer.forward = lambda _: work(own)
    try:
        return layer(hidden)
    finally:
        del layer.forward


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
def _projects_like_its_own_forward(policy: TokenPolicy, device: torch.device) -> bool:
    """Whether backbone + output layer give the model's own logits; some architectures scale or cap in between."""
    language_model = causal_lm(policy.model)
    probe = torch.arange(4, device=device)[None] % policy.vocabulary
    with evaluating(language_model):
        own = language_model(input_ids=probe, use_cache=False).logits.flatten(0, 1).float()
        try:
            hidden = policy._hidden({"input_ids": probe, "use_cache": False}, split=True)
            split = policy._capped(_output_layer(language_model)(hidden)).float()
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
