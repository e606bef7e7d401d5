"""The console script `llmac`: look at a recipe, check it, serve or sample from its model, pre-train its critic, answer.

Training is started by `accelerate launch recipes/train.py`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from llmac.errors import LlmacError

DOES_NOT_FIT = 3
"""Exit code of `llmac plan` for a run that needs more memory than there is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 1 when something is wrong, with one message and no traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    vllm_words: list[str] = []
    if words[:1] == ["serve"] and "--" in words:
        cut = words.index("--")
        words, vllm_words = words[:cut], words[cut + 1 :]
    parser = _parser()
    parsed, late = parser.parse_known_args(words, argparse.Namespace(vllm_words=vllm_words))
    # argparse takes no overrides after an option; people write them there.
    if not hasattr(parsed, "overrides") or any(w.startswith("-") or "=" not in w for w in late):
        parser.parse_args(words)  # says what is wrong and ends
    else:
        parsed.overrides = [*parsed.overrides, *late]
    try:
        return parsed.command(parsed)
    except LlmacError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has seen enough: `llmac show x.yaml | head`
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmac",
        description="Train language models by reinforcement learning with value models.",
        epilog="To train: accelerate launch recipes/train.py <recipe.yaml> [key.sub=value ...]",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    show = commands.add_parser("show", help="print a recipe, every key with its origin and meaning")
    check = commands.add_parser(
        "check", help="find what is wrong with a recipe, without loading a model"
    )
    for command in (show, check):
        command.add_argument("recipe", help="a recipe's YAML file")
        command.add_argument("overrides", nargs="*", metavar="key.sub=value")
    show.set_defaults(command=_show)
    check.set_defaults(command=_check)
    plan = commands.add_parser(
        "plan",
        help="say where the memory of the GPUs goes, and what to change when it does not fit",
        epilog="exit code: 0 it fits, 3 it does not, 1 something is wrong with the recipe or the numbers",
    )
    plan.add_argument("recipe", help="a recipe's YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value")
    plan.add_argument("--gpus", type=int, required=True, help="GPUs of one machine")
    plan.add_argument("--gpu-memory", type=float, required=True, help="of one GPU, GiB")
    plan.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    sharding = plan.add_mutually_exclusive_group()
    sharding.add_argument(
        "--zero",
        type=int,
        choices=(0, 1, 2, 3),
        default=0,
        help="ZeRO stage; 0: ddp.yaml (default)",
    )
    sharding.add_argument("--offload", action="store_true", help="zero3_offload.yaml")
    sharding.add_argument("--fsdp2", action="store_true", help="fsdp2.yaml")
    plan.add_argument(
        "--prompt-tokens",
        type=int,
        help="longest prompt (default: data.max_prompt_tokens, or 512)",
    )
    plan.add_argument("--json", action="store_true", help="bytes, for programs")
    plan.set_defaults(command=_plan)
    serve = commands.add_parser(
        "serve",
        help="serve a recipe's model with vLLM, for a trainer elsewhere to feed",
        epilog="further arguments of `vllm serve` after --, such as -- --data-parallel-size 4",
    )
    serve.add_argument("recipe", help="a recipe's YAML file, the one the trainer takes")
    serve.add_argument("overrides", nargs="*", metavar="key.sub=value")
    serve.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")
    serve.add_argument("--port", type=int, default=8000, help="to listen on (default 8000)")
    serve.set_defaults(command=_serve)
    rollouts = commands.add_parser(
        "rollouts", help="sample and judge responses with a recipe's policy, for value-pretrain"
    )
    rollouts.add_argument("recipe", help="a recipe's YAML file")
    rollouts.add_argument("overrides", nargs="*", metavar="key.sub=value")
    rollouts.add_argument(
        "--responses", type=int, required=True, help="how many, rounded up to whole groups"
    )
    rollouts.add_argument("--output", type=Path, required=True, help="the new .parquet file")
    rollouts.set_defaults(command=_rollouts)
    pretrain = commands.add_parser(
        "value-pretrain",
        help="fit a recipe's critic to stored rollouts, to start a run from",
        epilog="on several GPUs: accelerate launch recipes/value_pretrain.py, with the same arguments. "
        "Then train with critic.init=<output>/critic",
    )
    pretrain.add_argument("recipe", help="a recipe's YAML file")
    pretrain.add_argument("rollouts", type=Path, help="what `llmac rollouts` wrote")
    pretrain.add_argument("overrides", nargs="*", metavar="key.sub=value")
    pretrain.add_argument(
        "--output", type=Path, required=True, help="folder for critic/ and metrics.jsonl"
    )
    pretrain.add_argument(
        "--epochs", type=int, default=4, help="most passes over the rollouts (default 4)"
    )
    pretrain.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="of the prompts, to tell the best epoch by (default 0.1)",
    )
    pretrain.add_argument(
        "--patience",
        type=int,
        default=2,
        help="stop after so many epochs without a better one (default 2)",
    )
    pretrain.add_argument(
        "--lam",
        type=float,
        default=1.0,
        help="of the returns; 1: what came of the response (default 1)",
    )
    pretrain.set_defaults(command=_value_pretrain)
    _critic_traces_arguments(
        commands.add_parser(
            "critic-traces", help="have a teacher write what a generative critic learns from"
        )
    )
    _eval_critic_arguments(
        commands.add_parser(
            "eval-critic", help="say how good a critic is, against continuations of the policy"
        )
    )
    _generate_arguments(
        commands.add_parser(
            "generate", help="answer prompts with a model, guided by a critic or a smaller model"
        )
    )
    algorithms = commands.add_parser("algorithms", help="list algorithms and critics")
    algorithms.set_defaults(command=_algorithms)
    bring = commands.add_parser(
        "import-config", help="turn a TRL GRPO or PPO configuration into a recipe"
    )
    bring.add_argument("file", type=Path, help="YAML with the fields of GRPOConfig or PPOConfig")
    bring.add_argument(
        "--kind", choices=("grpo", "ppo"), help="default: told by the keys in the file"
    )
    bring.add_argument(
        "--processes",
        type=int,
        default=1,
        help="processes it was launched with; batch sizes are per process",
    )
    bring.add_argument("--output", type=Path, help="write the recipe here instead of printing it")
    bring.set_defaults(command=_import_config)
    return parser


def _critic_traces_arguments(trace: argparse.ArgumentParser) -> None:
    trace.epilog = "then train: accelerate launch recipes/train.py recipes/math_genac_sft.yaml data.name=<output>"
    trace.add_argument("recipe", help="a recipe's YAML file, with critic: {name: generative}")
    trace.add_argument("rollouts", type=Path, help="what `llmac rollouts` wrote")
    trace.add_argument("overrides", nargs="*", metavar="key.sub=value")
    trace.add_argument("--output", type=Path, required=True, help="the new .jsonl file")
    trace.add_argument(
        "--teacher-function",
        metavar="FILE.PY:FUNCTION",
        help="called with the critic's prompt and a dictionary about the state; returns text or None",
    )
    trace.add_argument("--teacher", metavar="MODEL", help="or a model: Hub id or folder")
    trace.add_argument("--chat", action="store_true", help="ask the model in its chat template")
    trace.add_argument(
        "--states", type=int, default=1020, help="to ask about, at most (default 1020)"
    )
    trace.add_argument(
        "--max-error",
        type=float,
        help="drop scores whose squared distance to the outcome is above (default: none)",
    )
    trace.add_argument("--seed", type=int, default=0, help="of the states (default 0)")
    trace.set_defaults(command=_critic_traces)


def _eval_critic_arguments(examine: argparse.ArgumentParser) -> None:
    examine.add_argument("run", help="a run's folder, or a recipe's YAML file")
    examine.add_argument("overrides", nargs="*", metavar="key.sub=value")
    examine.add_argument(
        "--critic",
        help="another critic than the run's: a value model's folder, a name, or '{name: ..., key: value}'",
    )
    examine.add_argument(
        "--step", help="a checkpoint's step, or final (default: the newest checkpoint)"
    )
    for name, meaning in (
        ("states", "states to judge (default 200)"),
        ("depths", "fractions of a response at which they stand (default 5)"),
        ("rollouts", "continuations of each state (default 64)"),
        ("siblings", "responses to a prompt (default 2)"),
    ):
        examine.add_argument(f"--{name}", type=int, help=meaning)
    examine.add_argument(
        "--success-above",
        type=float,
        help="outcome above which a response succeeded (default: midway between worst and best)",
    )
    examine.add_argument(
        "--save-states", type=Path, help="write the states here, for other critics"
    )
    examine.add_argument("--states-from", type=Path, help="judge by these states; sample none")
    examine.add_argument(
        "--output", type=Path, help="folder for the report (default: critic_eval/ of the run)"
    )
    examine.add_argument("--seed", type=int, default=0, help="of everything sampled (default 0)")
    examine.set_defaults(command=_eval_critic)


def _generate_arguments(answer: argparse.ArgumentParser) -> None:
    answer.add_argument("model", help="Hub id, folder, or a run's folder, whose final/ is taken")
    answer.add_argument(
        "--method",
        required=True,
        choices=("best_of_n", "vote", "weighted_vote", "beam", "token", "transfer"),
        help="how to choose; docs/decoding.md says which costs what",
    )
    answer.add_argument("--critic", type=Path, help="folder of a value model")
    answer.add_argument("--prompt", action="append", default=[], help="may be given several times")
    answer.add_argument("--prompts", type=Path, help="dataset file with the column `prompt`")
    answer.add_argument("--output", type=Path, help="new .jsonl file, a line for each prompt")
    answer.add_argument("--max-new-tokens", type=int, default=512, help="default 512")
    answer.add_argument("--temperature", type=float, default=1.0, help="default 1; 0: greedy")
    answer.add_argument("--top-p", type=float, default=1.0, help="default 1")
    answer.add_argument("--seed", type=int, default=0, help="of everything sampled (default 0)")
    answer.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    answer.add_argument(
        "--chat", action="store_true", help="put prompts into the model's chat template"
    )
    some = answer.add_argument_group(
        "options of some methods", "one that the method does not read is refused"
    )
    some.add_argument("--engine", choices=("hf", "vllm"), help="who samples (default hf)")
    some.add_argument("--n", type=int, help="responses to a prompt (default 8)")
    some.add_argument(
        "--answer",
        help="what responses vote for: auto (default), boxed, equals, regex:PATTERN, file.py:function",
    )
    some.add_argument(
        "--worst",
        type=float,
        help="reward of a failure, taken off the weights of votes (default 0)",
    )
    for name, meaning in (
        ("block-tokens", "beam: tokens sampled at once (default 64)"),
        ("beams", "beam: kept in each tree (default 2)"),
        ("expand", "beam: blocks sampled behind each (default 2)"),
        ("trees", "beam: independent searches (default 1)"),
        ("top-k", "token: candidates (default 10)"),
    ):
        some.add_argument(f"--{name}", type=int, help=meaning)
    some.add_argument("--lam", type=float, help="token, transfer: strength (default 1)")
    some.add_argument(
        "--rule", choices=("ratio", "tilt"), help="token: CriticControl's (default) or exp(lam V)"
    )
    some.add_argument(
        "--scale", choices=("logit", "probability"), help="ratio: what a value is (default logit)"
    )
    some.add_argument(
        "--others", choices=("zero", "keep"), help="ratio: tokens that are no candidates"
    )
    some.add_argument("--tuned", help="transfer: the small model after reinforcement learning")
    some.add_argument("--reference", help="transfer: the small model before it")
    answer.set_defaults(command=_generate)


def _show(arguments: argparse.Namespace) -> int:
    from llmac.config import load_recipe, show

    _print_yaml(show(load_recipe(arguments.recipe, arguments.overrides), arguments.overrides))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from llmac.check import check
    from llmac.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    critic = recipe.critic.name if recipe.critic else "no critic"
    print(f"{'ok':<12} recipe: {recipe.algorithm.name}, {critic}, {recipe.run.steps} steps")
    wrong = 0
    for finding in check(recipe):
        detail = finding.detail.replace("\n", f"\n{'':<13}")
        print(f"{finding.verdict:<12} {finding.subject}: {detail}")
        wrong += finding.verdict == "wrong"
    if wrong:
        print(f"error: {wrong} of the above must be put right before training", file=sys.stderr)
    return 1 if wrong else 0


def _plan(arguments: argparse.Namespace) -> int:
    from llmac.config import load_recipe
    from llmac.placement.plan import Machines, plan
    from llmac.placement.report import as_json, show
    from llmac.placement.sharding import Sharding
    from llmac.placement.ways_out import ways_out

    named = {0: Sharding.DDP, 1: Sharding.ZERO1, 2: Sharding.ZERO2, 3: Sharding.ZERO3}
    sharding = named[arguments.zero]
    if arguments.offload or arguments.fsdp2:
        sharding = Sharding.ZERO3_OFFLOAD if arguments.offload else Sharding.FSDP2
    machines = Machines(
        gpus=arguments.gpus,
        gpu_gib=arguments.gpu_memory,
        nodes=arguments.nodes,
        sharding=sharding,
    )
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    found = plan(recipe, machines, prompt_tokens=arguments.prompt_tokens)
    ways = ways_out(recipe, machines, prompt_tokens=arguments.prompt_tokens)
    if arguments.json:
        print(as_json(found, ways))
    else:
        show(found, ways)
    return 0 if found.fits else DOES_NOT_FIT


def _serve(arguments: argparse.Namespace) -> int:
    from llmac.config import load_recipe
    from llmac.serve import serve

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    serve(recipe, host=arguments.host, port=arguments.port, more=arguments.vllm_words)


def _rollouts(arguments: argparse.Namespace) -> int:
    _talk()
    from llmac.config import load_recipe
    from llmac.sample_rollouts import sample_rollouts

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(sample_rollouts(recipe, arguments.output, responses=arguments.responses).line())
    return 0


def _value_pretrain(arguments: argparse.Namespace) -> int:
    _talk()
    from llmac.config import load_recipe
    from llmac.value_pretrain import Pretraining, value_pretrain

    how = Pretraining(
        epochs=arguments.epochs,
        held_out=arguments.held_out,
        patience=arguments.patience,
        lam=arguments.lam,
    )
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    done = value_pretrain(recipe, arguments.rollouts, arguments.output, how)
    if done.is_main:
        print(done.line())
    return 0


def _critic_traces(arguments: argparse.Namespace) -> int:
    _talk()
    from llmac.config import load_recipe
    from llmac.critic_traces import Tracing, critic_traces

    how = Tracing(
        function=arguments.teacher_function,
        model=arguments.teacher,
        chat=arguments.chat,
        states=arguments.states,
        max_error=arguments.max_error,
        seed=arguments.seed,
    )
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(critic_traces(recipe, arguments.rollouts, arguments.output, how).line())
    return 0


def _talk() -> None:
    """What a command that works for a while says meanwhile goes to standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _eval_critic(arguments: argparse.Namespace) -> int:
    from llmac.errors import ConfigError

    step = arguments.step
    if step is not None and step != "final":
        if not step.isdigit():
            raise ConfigError(f"--step must be the number of a step, or final; found {step!r}")
        step = int(step)
    _talk()
    from rich.console import Console
    from rich.progress import Progress

    from llmac.critics.report import tables
    from llmac.eval_critic import Truth, eval_critic

    names = ("states", "depths", "rollouts", "siblings", "success_above")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("states", total=None)
        found = eval_critic(
            arguments.run,
            arguments.overrides,
            critic=arguments.critic,
            step=step,
            truth=Truth(**given) if given else None,
            states_from=arguments.states_from,
            save_states=arguments.save_states,
            output=arguments.output,
            seed=arguments.seed,
            told=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    console = Console()
    # A pipe has no width; a table cut at 80 columns is of no use to whom it is sent.
    Console(width=max(console.width, 132)).print(tables(found.report, found.about))
    print(f"wrote {found.output}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    _talk()
    from rich.console import Console

    from llmac.decoding.generation import DEFAULTS, READS, Generation
    from llmac.generate import generate, read_prompts, table

    names = {*DEFAULTS, *(name for reads in READS.values() for name in reads)}
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    decoded = generate(
        Generation(
            model=arguments.model,
            method=arguments.method,
            prompts=read_prompts(arguments.prompt, arguments.prompts),
            options=given,
            output=arguments.output,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            dtype=arguments.dtype,
            chat=arguments.chat,
        )
    )
    Console().print(table(decoded))
    if arguments.output is not None:
        print(f"wrote {arguments.output}")
    return 0


def _algorithms(arguments: argparse.Namespace) -> int:
    from llmac.config.cards import card_class, registry
    from llmac.config.words import first_line

    for room in ("algorithm", "critic"):
        print(f"{room}:")
        for name in registry(room):
            print(f"  {name:<22} {first_line(card_class(room, name))}")
    return 0


def _import_config(arguments: argparse.Namespace) -> int:
    from llmac.config.loading import read_yaml
    from llmac.migrate import from_trl

    imported = from_trl(
        read_yaml(arguments.file), kind=arguments.kind, processes=arguments.processes
    )
    print(imported.report(), file=sys.stderr)
    if arguments.output is None:
        print(imported.yaml(), end="")
    elif arguments.output.exists():
        print(f"error: {arguments.output} exists; choose another name", file=sys.stderr)
        return 1
    else:
        arguments.output.write_text(imported.yaml(), encoding="utf-8")
    return 0


def _print_yaml(text: str) -> None:
    """Colour for a terminal, plain text for a pipe: the same characters either way."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    styled.highlight_regex(r"(?m)^\s*-?\s*[\w.]+(?=:)", "bold cyan")
    styled.highlight_regex(r"(?m)(?<=\s)#.*$|^#.*$", "dim")
    styled.highlight_regex(r"(?m)# override\.", "bold yellow")
    Console().print(styled, end="", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
