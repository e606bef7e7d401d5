"""What `llmac generate` can be asked for, and what of it makes no sense."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmac.errors import ConfigError, did_you_mean

Method = Literal["best_of_n", "vote", "weighted_vote", "beam", "token", "transfer"]

READS: Mapping[str, frozenset[str]] = {
    "best_of_n": frozenset({"critic", "n", "engine"}),
    "vote": frozenset({"n", "answer", "engine"}),
    "weighted_vote": frozenset({"critic", "n", "answer", "worst", "engine"}),
    "beam": frozenset(
        {"critic", "block_tokens", "beams", "expand", "trees", "answer", "worst", "engine"}
    ),
    "token": frozenset({"critic", "rule", "scale", "lam", "top_k", "others"}),
    "transfer": frozenset({"tuned", "reference", "lam"}),
}
"""Method: options that it reads, besides those that all do."""
DEFAULTS: Mapping[str, Any] = {
    "n": 8,
    "answer": "auto",
    "worst": 0.0,
    "block_tokens": 64,
    "beams": 2,
    "expand": 2,
    "trees": 1,
    "rule": "ratio",
    "scale": "logit",
    "lam": 1.0,
    "top_k": 10,
    "others": "zero",
    "engine": "hf",
}
"""Of options that some method reads; the others among these must be given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What to answer, with what, and how."""

    model: str
    """Hub id, folder, or a run's folder, whose `final/` is taken."""
    method: Method
    prompts: Sequence[Mapping[str, Any]]
    """Rows; `prompt` is text or chat messages, the other columns are kept."""
    options: Mapping[str, Any]
    """Those that were given, of `READS`; what is missing has a default or must be given."""
    output: Path | None = None
    """New .jsonl file."""
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat: bool = False
    """Put prompts that are text into the chat template, as a user's message."""

    def __post_init__(self) -> None:
        """Refuse what would be found out only when models are loaded, or never."""
        if self.method not in READS:
            raise ConfigError(
                f"--method {self.method!r} is not there.{did_you_mean(self.method, list(READS))}"
            )
        reads = READS[self.method]
        for name in self.options:
            if name not in reads:
                raise ConfigError(
                    f"{flag(name)} has no effect with --method {self.method}; leave it out. It reads "
                    f"{', '.join(sorted(map(flag, reads)))}"
                )
        for name in sorted(reads - DEFAULTS.keys() - self.options.keys()):
            raise ConfigError(f"--method {self.method} needs {flag(name)}")
        for name in ("n", "block_tokens", "beams", "expand", "trees", "top_k"):
            if name in reads and self.option(name) < 1:
                raise ConfigError(f"{flag(name)} is {self.option(name)}; expected at least 1")
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens}, --temperature {self.temperature}, --top-p {self.top_p}; "
                "expected at least 1, at least 0, and above 0 up to 1"
            )
        if not self.prompts:
            raise ConfigError("there are no prompts; give --prompt TEXT or --prompts FILE")
        for number, row in enumerate(self.prompts):
            if not isinstance(row.get("prompt"), str | list) or not row["prompt"]:
                raise ConfigError(
                    f"row {number} of the prompts has no `prompt` that is text or chat messages; its columns are "
                    f"{', '.join(row) or 'none'}"
                )

    def option(self, name: str) -> Any:
        """As given, or its default."""
        return self.options.get(name, DEFAULTS.get(name))


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return f"--{name.replace('_', '-')}"
