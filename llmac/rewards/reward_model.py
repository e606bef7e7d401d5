"""A sequence-classification model as a reward function (RLHF)."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmac.errors import ConfigError, RewardError


class RewardModel:
    """Its scalar output for prompt + response is the reward (Christiano et al. 2017; Ouyang et al. 2022).

    Chat messages go through the model's own chat template, strings are concatenated. The text is tokenized by the
    reward model's tokenizer, which need not be the policy's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "reward_model",
        batch_rows: int = 16,
    ) -> None:
        """Take a loaded model; its device stays.

        Args:
            model: a sequence-classification model with one output.
            tokenizer: the model's.
            name: of the reward in metrics.
            batch_rows: texts in one forward pass.

        Raises:
            ConfigError: the model has not exactly one output, or no token can be used for padding.
        """
        if model.config.num_labels != 1:
            raise ConfigError(
                f"reward model {name} has {model.config.num_labels} outputs; a reward model has one. "
                "Was it trained as a classifier?"
            )
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ConfigError(
                    f"reward model {name}: its tokenizer has neither a pad nor an end token"
                )
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.__name__ = name
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._batch_rows = batch_rows
        self._max_tokens = getattr(
            model.config, "max_position_embeddings", None
        )  # not every model has a limit

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_rows: int = 16,
    ) -> "RewardModel":
        """Load from a folder or the Hub.

        Raises:
            ConfigError: nothing can be loaded from there, or the model has no trained score head.
        """
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=revision, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"reward model {path!r} cannot be loaded: {error}") from error
        if loading["missing_keys"]:
            # transformers would go on with a random head, and every reward would be noise.
            raise ConfigError(
                f"{path!r} is not a trained reward model: it has no weights for "
                f"{', '.join(sorted(loading['missing_keys']))}"
            )
        name = str(path).rstrip("/").rpartition("/")[2]
        return cls(model.to(device), tokenizer, name=name, batch_rows=batch_rows)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float]:
        """One reward for each completion, under the batch contract."""
        token_ids = [self._token_ids(p, c) for p, c in zip(prompts, completions, strict=True)]
        # Texts of similar length together, so that little is padded.
        order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
        rewards = [0.0] * len(token_ids)
        for start in range(0, len(order), self._batch_rows):
            rows = order[start : start + self._batch_rows]
            padded = self._tokenizer.pad(
                {"input_ids": [token_ids[i] for i in rows]}, return_tensors="pt"
            ).to(self._model.device)
            scores = self._model(
                input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
            ).logits
            for i, score in zip(rows, scores[:, 0].float().tolist(), strict=True):
                rewards[i] = score
        return rewards

    def _token_ids(self, prompt: Any, completion: Any) -> list[int]:
        if isinstance(prompt, str):
            token_ids = self._tokenizer(prompt + completion)["input_ids"]
        else:
            if self._tokenizer.chat_template is None:
                raise ConfigError(
                    f"reward model {self.__name__} has no chat template and the prompts are chat messages. "
                    "Give the dataset string prompts, or a reward model trained on chats."
                )
            text = self._tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            assert isinstance(text, str)  # tokenize=False
            token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._max_tokens is not None and len(token_ids) > self._max_tokens:
            raise RewardError(
                f"prompt and response have {len(token_ids)} tokens; reward model {self.__name__} reads "
                f"{self._max_tokens}. Lower rollout.max_new_tokens or data.max_prompt_tokens."
            )
        return token_ids
