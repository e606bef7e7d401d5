"""A language model's backbone with a value head: V(s) for every state of a row."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel

from llmac.errors import CheckpointError
from llmac.models.loading import LanguageModel
from llmac.models.packing import PackedRows
from llmac.models.path_probe import PathProbe
from llmac.models.value_heads import HeadSpec, build_head, load_head, saved_spec

HiddenStates = Callable[[PackedRows], Tensor]
"""Rows -> hidden vectors of their tokens, flattened [b * L, H]."""


class ValueModel(nn.Module):
    """V(s_t), in float32, from the backbone's hidden vector of the last token of s_t."""

    def __init__(
        self,
        backbone: LanguageModel,
        spec: HeadSpec | None = None,
        *,
        states: HiddenStates | None = None,
    ) -> None:
        """Put a fresh head on `backbone`.

        Args:
            backbone: what `AutoModel` gives; any architecture with hidden vectors.
            spec: the head; None: a scalar one.
            states: says the hidden vectors of a trunk that belongs to another module (the policy's, in its form for
                training). The trunk is then not among this module's parameters and learns nothing from values.
        """
        super().__init__()
        if states is None:
            self._trunk = backbone
        else:
            self._borrowed = (backbone,)
        self._states = states
        self._probe = PathProbe()
        self.spec = spec or HeadSpec()
        self.head = build_head(backbone.config.get_text_config().hidden_size, self.spec)

    @property
    def backbone(self) -> LanguageModel:
        """The trunk, owned or borrowed."""
        return self._trunk if self._states is None else self._borrowed[0]

    def forward(self, rows: PackedRows, *, raw: bool = False) -> Tensor:
        """Values [b, T+1] in float32: column t is V(s_t); column T_i and beyond is V(s_T).

        With `raw` what they are made from instead: the outputs [b, T+1, E, N] of the E heads.
        """
        if self._states is None:
            vocabulary = self._trunk.config.get_text_config().vocab_size
            self._probe(self._trunk, rows, self._hidden, vocabulary=vocabulary)
            hidden = self._hidden(rows)
        else:
            hidden = self._states(rows)
        # States that rows have in common are judged once.
        asked, place = rows.states.unique(return_inverse=True)
        judged = self.head(hidden.index_select(0, asked))
        outputs = judged.index_select(0, place.flatten()).unflatten(0, place.shape)
        if raw:
            return outputs
        with torch.autocast(outputs.device.type, enabled=False):
            return self.spec.values(outputs)

    def _hidden(self, rows: PackedRows) -> Tensor:
        return self._trunk(**rows.inputs()).last_hidden_state.flatten(0, 1)

    def copy_on(
        self, backbone: LanguageModel, *, states: HiddenStates | None = None
    ) -> "ValueModel":
        """The same head, weights copied, on another trunk, or on this one in another form."""
        other = ValueModel(backbone, self.spec, states=states)
        other.head.load_state_dict(self.head.state_dict())
        return other

    @classmethod
    def from_pretrained(cls, directory: str | Path, **loading: object) -> "ValueModel":
        """Load a folder with a backbone, as `AutoModel` loads it, and a head of any kind beside it.

        Raises:
            CheckpointError: the folder has a backbone but no value head, or lacks weights of the backbone.
        """
        directory = Path(directory)
        spec = saved_spec(directory)
        backbone, found = AutoModel.from_pretrained(directory, output_loading_info=True, **loading)
        if found["missing_keys"]:
            # transformers would go on with random weights in their place.
            raise CheckpointError(f"{directory} lacks weights: {sorted(found['missing_keys'])[:3]}")
        model = cls(backbone, spec)
        model.head, _ = load_head(directory, backbone.config.get_text_config().hidden_size)
        return model
