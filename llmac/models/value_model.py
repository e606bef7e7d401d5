"""A language model's backbone with a scalar head: V(s) for every state of a row."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from llmac.errors import CheckpointError
from llmac.models.loading import LanguageModel
from llmac.models.packing import PackedRows

HEAD_FILE = "value_head.safetensors"
ABOUT_FILE = "value_model.json"


class ValueModel(nn.Module):
    """V(s_t) = w · h_t + b, in float32, h_t the backbone's hidden vector of the last token of s_t.

    w starts at 0, so every state has the value b until something is learned: set b to the mean reward and the
    explained variance of the untrained critic is 0, not negative.
    """

    def __init__(self, backbone: LanguageModel, *, detach_trunk: bool = False) -> None:
        """Put a fresh head on `backbone`.

        Args:
            backbone: what `AutoModel` gives; any architecture with hidden vectors.
            detach_trunk: stop the value gradient at the head (a trunk shared with the policy).
        """
        super().__init__()
        if detach_trunk:
            # Kept out of `parameters()`: the trunk belongs to the policy, and only the head learns from values.
            self._borrowed = (backbone,)
        else:
            self._trunk = backbone
        self.detach_trunk = detach_trunk
        config = backbone.config.get_text_config()
        self.head = nn.Linear(config.hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def backbone(self) -> LanguageModel:
        """The trunk, owned or borrowed."""
        return self._borrowed[0] if self.detach_trunk else self._trunk

    def forward(self, rows: PackedRows) -> Tensor:
        """Values [b, T+1] in float32: column t is V(s_t); column T_i and beyond is V(s_T)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_trunk):
            hidden = self.backbone(input_ids=rows.input_ids, use_cache=False).last_hidden_state
        states = hidden.flatten(0, 1)[rows.states]
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float()).squeeze(-1)

    def save_pretrained(self, directory: Path) -> None:
        """A folder that `ValueModel.from_pretrained` and, for the backbone, `AutoModel.from_pretrained` load."""
        self.backbone.save_pretrained(str(directory))
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in self.head.state_dict().items()},
            directory / HEAD_FILE,
        )
        (directory / ABOUT_FILE).write_text(json.dumps({"head": "scalar"}))

    @classmethod
    def from_pretrained(cls, directory: str | Path, **loading: object) -> "ValueModel":
        """Load what `save_pretrained` wrote.

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
