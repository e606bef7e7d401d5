"""What a generative critic reads: a template with the problem, the response so far, and what is known of the writer.

The packaged template, `templates/genac.jinja`, has the sections that are reported of GenAC's (arXiv:2604.10701) in our
own words. What changes from state to state of one response comes last in it, so that an engine which keeps what it has
read need not read the rest again.
"""

from collections.abc import Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmac.core.types import Prompt
from llmac.errors import ConfigError

if TYPE_CHECKING:
    from llmac.critics.generative import GenerativeConfig

PACKAGED = "genac.jinja"
VARIABLES = {
    "problem": "the prompt's text",
    "partial": "the response up to the state, text",
    "low": "smallest score",
    "high": "largest score",
    "tag": "name of the tags around the score",
    "actor": "what the writer is called",
    "success_rate": "of the writer lately, from 0 to 1; none: not told, or not known yet",
    "tokens_used": "length of the partial response in the writer's tokens; none: not told",
    "tokens_left": "how much longer it may get; none: not told",
    "attempts": "earlier responses of the writer, each with problem, response and solved",
}
"""What a template may use, and what it means."""
_NEEDED = ("problem", "partial")
NOTHING_TOLD: Mapping[str, Any] = {
    "success_rate": None,
    "tokens_used": None,
    "tokens_left": None,
    "attempts": [],
}
"""What a template gets about the writer where nothing is known of it."""


class CriticTemplate:
    """A Jinja template over `VARIABLES`; the newline behind a block's tag is dropped (`trim_blocks`)."""

    def __init__(self, path: str | Path | None) -> None:
        """Read and check it.

        Args:
            path: of a template file; None: the packaged one.

        Raises:
            ConfigError: there is no such file, it is no template, it asks for what is not known here, or it shows not
                both problem and partial response.
        """
        self._name = PACKAGED if path is None else str(path)
        if path is None:
            self.source = (files("llmac.critics") / "templates" / PACKAGED).read_text("utf-8")
        else:
            file = Path(path).expanduser()
            if not file.is_file():
                raise ConfigError(
                    f"critic.template: there is no file {path} (looked in {Path.cwd()})"
                )
            self.source = file.read_text("utf-8")
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, undefined=StrictUndefined
        )
        try:
            used = meta.find_undeclared_variables(self._environment.parse(self.source))
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"critic.template: {self._name} is not a Jinja template: {error.message} (line {error.lineno})"
            ) from error
        unknown = sorted(used - VARIABLES.keys())
        if unknown:
            raise ConfigError(
                f"critic.template: {self._name} uses {', '.join(unknown)}, which nobody fills in; it may use "
                f"{', '.join(VARIABLES)}"
            )
        lacking = [name for name in _NEEDED if name not in used]
        if lacking:
            raise ConfigError(
                f"critic.template: {self._name} does not use {' and '.join(lacking)}; a critic that does not see both "
                "problem and partial cannot judge a state"
            )

    def write(self, **told: Any) -> str:
        """The critic's prompt: `told` has every one of `VARIABLES`, whose types differ."""
        return self._compiled.render(**told)

    @cached_property
    def _compiled(self) -> Any:
        return self._environment.from_string(self.source)


def critic_prompt(
    template: CriticTemplate,
    config: "GenerativeConfig",
    *,
    problem: str,
    partial: str,
    told: Mapping[str, Any],
) -> str:
    """What a critic reads about a state.

    Args:
        template: of the prompt.
        config: scale, tag and the writer's name.
        problem: the prompt's text.
        partial: the response up to the state.
        told: of the writer; the variables of `NOTHING_TOLD`.
    """
    low, high = config.scale
    return template.write(
        problem=problem,
        partial=partial,
        low=low,
        high=high,
        tag=config.tag,
        actor=config.actor,
        **told,
    )


def problem_text(prompt: Prompt) -> str:
    """A prompt as a critic reads it: its text, or of chat messages what each said.

    >>> problem_text(Prompt(id="p0", token_ids=(1,), source=[{"role": "user", "content": "1+1="}]))
    '1+1='
    """
    if isinstance(prompt.source, str):
        return prompt.source
    said = [(str(message["role"]), str(message["content"])) for message in prompt.source]
    if len(said) == 1:
        return said[0][1]
    return "\n".join(f"{role}: {content}" for role, content in said)
