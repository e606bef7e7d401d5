"""`llmac generate`: answer prompts with a model, guided by a critic or by what smaller models have learned."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from llmac.config.loading import read_yaml
from llmac.config.schema import ModelConfig
from llmac.core.protocols import Player, SamplingParams
from llmac.core.types import Prompt
from llmac.data.tables import read_file
from llmac.data.tokenizing import encoder
from llmac.decoding import (
    Decoded,
    beam,
    best_of_n,
    majority_vote,
    token_guided,
    transfer,
    weighted_vote,
)
from llmac.decoding.answers import answer_finder
from llmac.decoding.candidates import prompts_of
from llmac.decoding.fitting import (
    check_critic_reads,
    check_judges_states,
    check_same_tokens,
    check_says_chances,
)
from llmac.decoding.generation import READS, Generation
from llmac.decoding.provenance import misfits, provenance
from llmac.errors import CheckpointError, ConfigError
from llmac.models.loading import context_length, load_causal_lm, load_tokenizer, torch_dtype
from llmac.models.value_heads import HEAD_FILE, saved_spec
from llmac.models.value_model import ValueModel
from llmac.new_engine import speaking
from llmac.outputs import make_room_for

logger = logging.getLogger(__name__)


def generate(asked: Generation) -> list[Decoded]:
    """Answer all prompts; with `output`, also write a line for each. One process.

    Raises:
        ConfigError, CheckpointError, DataError: before any model is loaded, where that can be known.
    """
    find = answer_finder(asked.option("answer")) if "answer" in READS[asked.method] else None
    model = _spec(asked, _final(asked.model, "the model"))
    critic = _critic_folder(asked.options["critic"]) if "critic" in asked.options else None
    others = {
        role: _spec(asked, _final(asked.options[role], f"--{role}"))
        for role in ("tuned", "reference")
        if role in asked.options
    }
    if asked.output is not None:
        make_room_for(asked.output, "--output")
    if critic is not None:
        head = saved_spec(critic).head
        check_judges_states(head)
        if asked.method == "token" and (asked.option("rule"), asked.option("scale")) == (
            "ratio",
            "probability",
        ):
            check_says_chances(head)
        known = provenance(critic)
        check_critic_reads(
            model, critic, sources=[critic, *([Path(known.policy)] if known else [])]
        )
        for warning in misfits(known, policy=model.name, response_tokens=asked.max_new_tokens):
            logger.warning("%s", warning)
    check_same_tokens(model, others.values())
    prompts = _prompts(asked, model)
    decoded = _decode(asked, model, prompts, critic, others, find)
    if asked.output is not None:
        asked.output.write_text("".join(map(line, decoded)), encoding="utf-8")
    return decoded


def line(decoded: Decoded) -> str:
    """One of the output; what JSON has no word for (dates, bytes, decimals) is written as text."""
    return json.dumps(as_dict(decoded), ensure_ascii=False, default=str) + "\n"


def as_dict(decoded: Decoded) -> dict[str, Any]:
    """A line of the output: the prompt and its other columns, what was chosen, and from what."""

    def told(one: Any) -> dict[str, Any]:
        return {
            "response": one.text,
            "answer": None if one.answer is None else str(one.answer),
            "value": one.value,
            "logprob": one.logprob,
            "finish": str(one.finish),
        }

    prompt = decoded.prompt
    return {
        "prompt": prompt.source,
        "columns": dict(prompt.columns),  # apart: a data set has an `answer` too
        **told(decoded.chosen),
        "support": decoded.support,
        "sampled_tokens": decoded.sampled_tokens,
        "valued_states": decoded.valued_states,
        "candidates": [told(one) for one in decoded.candidates],
    }


def table(decoded: Sequence[Decoded], *, rows: int = 20) -> Table:
    """What a person wants to see: the first prompts and their answers, and what all of them cost."""
    shown = Table(
        caption=f"{len(decoded)} prompts, {sum(d.sampled_tokens for d in decoded)} tokens sampled, "
        f"{sum(d.valued_states for d in decoded)} states valued, "
        f"{sum(not d.chosen.finished for d in decoded)} responses cut at the length limit"
    )
    for title in ("prompt", "response", "answer", "value", "support", "tokens"):
        shown.add_column(title, overflow="fold")
    for one in decoded[:rows]:
        chosen = one.chosen
        shown.add_row(
            _plain(one.prompt.source),
            _plain(chosen.text),
            "-" if chosen.answer is None else _plain(chosen.answer),
            "-" if chosen.value is None else f"{chosen.value:.3f}",
            "-" if one.support is None else f"{one.support:.2f}",
            str(one.sampled_tokens),
        )
    return shown


def _plain(said: object) -> Text:
    """As it is: brackets in a response are no markup."""
    return Text(said if isinstance(said, str) else str(said))


def read_prompts(texts: Sequence[str], file: Path | None) -> list[Mapping[str, Any]]:
    """Rows with a `prompt` each.

    Args:
        texts: prompts as they are.
        file: of any kind that datasets are read from.

    Raises:
        DataError: the file cannot be read.
    """
    rows: list[Mapping[str, Any]] = [{"prompt": text} for text in texts]
    return rows + ([] if file is None else list(read_file(file)))


def _decode(
    asked: Generation,
    model: ModelConfig,
    prompts: Sequence[Prompt],
    critic: Path | None,
    others: Mapping[str, ModelConfig],
    find: Callable[[str], Any] | None,
) -> list[Decoded]:
    option = asked.option
    sampling = SamplingParams(
        temperature=asked.temperature,
        top_p=asked.top_p,
        max_new_tokens=asked.max_new_tokens,
        seed=asked.seed,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = None
    if critic is not None:
        value = ValueModel.from_pretrained(critic, dtype=torch_dtype(model)).to(device)
    if asked.method in ("token", "transfer"):
        tokenizer = load_tokenizer(model)
        policy = _on(device, model)
        if asked.method == "token":
            assert value is not None, "checked"
            return token_guided(
                policy,
                tokenizer,
                value,
                prompts,
                rule=option("rule"),
                scale=option("scale"),
                lam=option("lam"),
                top_k=option("top_k"),
                others=option("others"),
                sampling=sampling,
            )
        pair = _on(device, others["tuned"]), _on(device, others["reference"])
        return transfer(policy, tokenizer, [pair], prompts, lam=option("lam"), sampling=sampling)
    player = _player(asked, model, device, prompts)
    try:
        if asked.method == "vote":
            assert find is not None, "all votes have one"
            return majority_vote(player, prompts, option("n"), answer=find, sampling=sampling)
        assert value is not None, "checked"
        if asked.method == "best_of_n":
            return best_of_n(player, value, prompts, option("n"), sampling=sampling)
        assert find is not None, "all votes have one"
        if asked.method == "weighted_vote":
            return weighted_vote(
                player,
                value,
                prompts,
                option("n"),
                answer=find,
                worst=option("worst"),
                sampling=sampling,
            )
        return beam(
            player,
            value,
            prompts,
            block_tokens=option("block_tokens"),
            width=option("beams"),
            expand=option("expand"),
            trees=option("trees"),
            answer=find,
            worst=option("worst"),
            sampling=sampling,
        )
    finally:
        player.engine.close()


def _player(
    asked: Generation, model: ModelConfig, device: str, prompts: Sequence[Prompt]
) -> Player:
    tokenizer = load_tokenizer(model)
    if asked.option("engine") == "hf":
        from llmac.engines.hf_engine import HFEngine

        return speaking(HFEngine(_on(device, model), tokenizer), tokenizer)
    from llmac.engines.vllm_engine import VLLMEngine

    longest = max(len(prompt.token_ids) for prompt in prompts) + asked.max_new_tokens
    engine = VLLMEngine(model.name, tokenizer, dtype=asked.dtype, max_model_len=longest)
    return speaking(engine, tokenizer)


def _on(device: str, model: ModelConfig) -> Any:
    return torch.nn.Module.to(load_causal_lm(model), device)


def _prompts(asked: Generation, model: ModelConfig) -> list[Prompt]:
    encode = encoder(load_tokenizer(model))
    written = [
        [{"role": "user", "content": row["prompt"]}]
        if asked.chat and isinstance(row["prompt"], str)
        else row["prompt"]
        for row in asked.prompts
    ]
    encoded = prompts_of(encode, written)
    prompts = [
        Prompt(
            id=prompt.id,
            token_ids=prompt.token_ids,
            source=row["prompt"],
            columns={name: value for name, value in row.items() if name != "prompt"},
        )
        for prompt, row in zip(encoded, asked.prompts, strict=True)
    ]
    room = context_length(model)
    for prompt in prompts:
        if room is not None and len(prompt.token_ids) + asked.max_new_tokens > room:
            raise ConfigError(
                f"{prompt.id} has {len(prompt.token_ids)} tokens, and with --max-new-tokens {asked.max_new_tokens} "
                f"that is more than the {room} of {model.name}; lower --max-new-tokens"
            )
    return prompts


def _spec(asked: Generation, name: str) -> ModelConfig:
    return ModelConfig(name=name, dtype=asked.dtype)


def _final(name: str, what: str) -> str:
    """A run's folder stands for the model that it left."""
    folder = Path(name).expanduser()
    if not (folder / "config.yaml").is_file():
        return name
    if not (folder / "final" / "config.json").is_file():
        start = read_yaml(folder / "config.yaml").get("model", {}).get("name")
        raise CheckpointError(
            f"{what}: the run {folder} has no final/ model; let it end, or give the model it started from ({start})"
        )
    return str(folder / "final")


def _critic_folder(given: str | Path) -> Path:
    folder = Path(given).expanduser()
    if (folder / HEAD_FILE).is_file():
        return folder
    if not folder.is_dir():
        raise ConfigError(f"--critic: there is no folder {folder} (looked in {Path.cwd()})")
    inside = [p for p in ("critic", "final/critic") if (folder / p / HEAD_FILE).is_file()]
    if inside:
        return folder / inside[0]
    raise CheckpointError(
        f"--critic: {folder} has no {HEAD_FILE}, so it is not a value model saved by llmac; `llmac value-pretrain` and "
        "runs with a value head leave one. Critics of other kinds guide from Python: see llmac.decoding"
    )
