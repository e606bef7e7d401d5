"""A language model's backbone with a scalar head: V(s) for every state of a row."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from llmac.errors import CheckpointError
from llmac.models.loading import LanguageModel
from llmac.models.packing import PackedRows

HEAD_FILE = "value_head.safetensors"
ABOUT_FILE = "value_model.json"


HiddenStates = Callable[[PackedRows], Tensor]
"""Rows -> hidden vectors of their tokens, flattened [b * L, H]."""


class ScalarHead(nn.Linear):
    """w · h + b + offset, computed in float32 whatever the weights are kept in.

    w and b start at 0. `offset` is no parameter: setting it to the mean reward gives the untrained critic an explained
    variance of 0, not a negative one, and does so wherever an optimizer keeps copies of the parameters (ZeRO).
    """

    offset: Tensor

    def __init__(self, width: int) -> None:
        """A head over hidden vectors of `width`."""
        super().__init__(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        """Values [...] of hidden vectors [..., H]."""
        with torch.autocast(input.device.type, enabled=False):
            values = functional.linear(input.float(), self.weight.float(), self.bias.float())
            return values.squeeze(-1) + self.offset.float()


class ValueModel(nn.Module):
    """V(s_t), in float32, from the backbone's hidden vector of the last token of s_t."""

    def __init__(self, backbone: LanguageModel, *, states: HiddenStates | None = None) -> None:
        """Put a fresh head on `backbone`.

        Args:
            backbone: what `AutoModel` gives; any architecture with hidden vectors.
            states: says the hidden vectors of a trunk that belongs to another module (the policy's, in its form for
                training). The trunk is then not among this module's parameters and learns nothing from values.
        """
        super().__init__()
        if states is None:
            self._trunk = backbone
        else:
            self._borrowed = (backbone,)
        self._states = states
        self.head = ScalarHead(backbone.config.get_text_config().hidden_size)

    @property
    def backbone(self) -> LanguageModel:
        """The trunk, owned or borrowed."""
        return self._trunk if self._states is None else self._borrowed[0]

    def forward(self, rows: PackedRows) -> Tensor:
        """Values [b, T+1] in float32: column t is V(s_t); column T_i and beyond is V(s_T)."""
        if self._states is None:
            hidden = self._trunk(input_ids=rows.input_ids, use_cache=False).last_hidden_state
            states = hidden.flatten(0, 1)
        else:
            states = self._states(rows)
        return self.head(states[rows.states])

    @classmethod
    def from_pretrained(cls, directory: str | Path, **loading: object) -> "ValueModel":
        """Load a folder with a backbone, as `AutoModel` loads it, and a head beside it.

        Raises:
            CheckpointError: the folder has a backbone but no value head, or lacks weights of the backbone.
        """
        directory = Path(directory)
        if not (directory / HEAD_FILE).is_file():
            raise CheckpointError(
                f"{directory} has no {HEAD_FILE}: it is not a value model saved by llmac"
            )
        backbone, found = AutoModel.from_pretrained(directory, output_loading_info=True, **loading)
        if found["missing_keys"]:
            # transformers would go on with random weights in their place.
            raise CheckpointError(f"{directory} lacks weights: {sorted(found['missing_keys'])[:3]}")
        model = cls(backbone)
        model.head.load_state_dict(load_file(directory / HEAD_FILE))
        return model


def save_head(weights: Mapping[str, Tensor], directory: Path) -> None:
    """Put a head beside the backbone that is saved in `directory`, so that `from_pretrained` finds a value model."""
    save_file(dict(weights), directory / HEAD_FILE)
    (directory / ABOUT_FILE).write_text(json.dumps({"head": "scalar"}))
