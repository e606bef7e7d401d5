"""Which prompts were asked lately, and what the responses earned: the context of V_0."""

import dataclasses
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmac.core.types import Prompt
from llmac.errors import CheckpointError

RECORD_FILE = "prompt_record.json"


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
        entries = [
            {
                **dataclasses.asdict(entry),
                "prompt": {
                    "id": entry.prompt.id,
                    "token_ids": list(entry.prompt.token_ids),
                    "source": entry.prompt.source,
                },
            }
            for entry in self._entries
        ]
        content = {"step": self.step, "entries": entries}
        (directory / RECORD_FILE).write_text(json.dumps(content))

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
        content: dict[str, Any] = json.loads(path.read_text())
        self.step = int(content["step"])
        self._entries.clear()
        for entry in content["entries"]:
            prompt = entry["prompt"] | {"token_ids": tuple(entry["prompt"]["token_ids"])}
            self._entries.append(Asked(**entry | {"prompt": Prompt(**prompt)}))
