"""Which prompts were asked lately, and what the responses earned: the context of V_0."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmac.core.types import Prompt
from llmac.errors import CheckpointError

RECORD_FILE = "prompt_record.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One prompt in one step."""

    prompt: Prompt
    solved: float
    """Mean outcome as a fraction of the reward range, in [0, 1]."""
    responses: int
    step: int


class PromptRecord:
    """The last `size` prompts and their outcomes, oldest first, the same on all ranks."""

    def __init__(self, size: int) -> None:
        """Empty.

        Args:
            size: entries kept.
        """
        self._entries: deque[Asked] = deque(maxlen=size)
        self.step = 0
        """Steps seen so far."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Asked]:
        return iter(self._entries)

    def add(self, entries: Iterable[tuple[Prompt, float, int]]) -> None:
        """One more step: (prompt, solved, responses) of each of its prompts."""
        self.step += 1
        for prompt, solved, responses in entries:
            self._entries.append(
                Asked(prompt=prompt, solved=solved, responses=responses, step=self.step)
            )

    def latest(self, count: int) -> list[Asked]:
        """The newest entries, at most `count` of them, oldest first."""
        return list(self._entries)[-count:]

    def save(self, directory: Path) -> None:
        """One file; call it on one rank."""
        entries = list(self._entries)
        numbers = {
            "token_ids": torch.tensor([i for e in entries for i in e.prompt.token_ids]),
            "tokens": torch.tensor([len(e.prompt.token_ids) for e in entries]),
            "solved": torch.tensor([e.solved for e in entries], dtype=torch.float64),
            "responses": torch.tensor([e.responses for e in entries]),
            "steps": torch.tensor([e.step for e in entries]),
        }
        texts = json.dumps([(e.prompt.id, e.prompt.source) for e in entries])
        metadata = {"step": str(self.step), "prompts": texts}
        save_file(numbers, directory / RECORD_FILE, metadata=metadata)

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote; of a longer record the newest entries are kept.

        Raises:
            CheckpointError: there is no record.
        """
        path = directory / RECORD_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{directory} has no {RECORD_FILE}: it was not saved by a prompt_value critic"
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            numbers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.step = int(metadata["step"])
        ids = numbers["token_ids"].long().split(numbers["tokens"].tolist())
        columns = (numbers[name].tolist() for name in ("solved", "responses", "steps"))
        self._entries.clear()
        for (name, source), tokens, solved, responses, step in zip(
            json.loads(metadata["prompts"]), ids, *columns, strict=True
        ):
            prompt = Prompt(id=name, token_ids=tuple(tokens.tolist()), source=source)
            self._entries.append(
                Asked(prompt=prompt, solved=solved, responses=responses, step=step)
            )
