"""A plan for people (a table of at most 100 columns) and for machines (JSON)."""

import json
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmac.placement.plan import Plan
from llmac.placement.sampling import GIB, Sampler
from llmac.placement.skeletons import Skeleton
from llmac.placement.ways_out import WayOut

WIDTH = 100


def table(plan: Plan, ways_out: Sequence[WayOut]) -> RenderableType:
    """The whole answer: hardware, GiB by phase, sampling, main memory, what is wrong and the ways out."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    grid.add_column("GiB on the fullest GPU")
    for phase in plan.phases:
        grid.add_column(phase.name, justify="right")
    for item in _items(plan):
        sizes = [phase.items.get(item, 0) for phase in plan.phases]
        grid.add_row(item, *(_gib(size) if size else "" for size in sizes))
    grid.add_row("total", *(_gib(phase.total) for phase in plan.phases), style="bold")
    free = [plan.machines.gpu_memory - phase.total for phase in plan.phases]
    grid.add_row("free", *(_gib(size) for size in free))
    head, below = map(Text, _head(plan)), map(Text, (*_sampling(plan), _host(plan)))
    return Group(*head, Text(), grid, Text(), *below, *_end(plan, ways_out))


def show(plan: Plan, ways_out: Sequence[WayOut], *, file: TextIO | None = None) -> None:
    """Print `table`."""
    Console(file=file, width=WIDTH, highlight=False).print(table(plan, ways_out))


def as_json(plan: Plan, ways_out: Sequence[WayOut]) -> str:
    """The same numbers in bytes."""
    sampler = plan.sampler
    return json.dumps(
        {
            "fits": plan.fits,
            "gpus": {"training": plan.training_gpus, "serving": plan.serving_gpus},
            "sharding": str(plan.machines.sharding),
            "gpu_memory_bytes": plan.machines.gpu_memory,
            "policy": _counts(plan.policy),
            "critic": _counts(plan.critic) if plan.critic else None,
            "micro_batch_tokens": plan.micro_batch,
            "row_tokens": plan.row_tokens,
            "phases": [
                {"name": phase.name, "total_bytes": phase.total, "bytes": dict(phase.items)}
                for phase in plan.phases
            ],
            "cache": {
                "tokens": sampler.cache_tokens,
                "responses": _responses(sampler, plan.row_tokens),
            },
            "second_engines": [
                {
                    "whose": second.whose,
                    "row_tokens": second.row,
                    "cache": {
                        "tokens": second.sampler.cache_tokens,
                        "responses": _responses(second.sampler, second.row),
                    },
                }
                for second in plan.seconds
            ],
            "host_bytes": {"start": plan.host_start, "training": plan.host},
            "problems": list(plan.problems),
            "ways_out": [
                {"changes": list(way.changes), "fullest_phase_bytes": way.highest}
                for way in ways_out
            ],
        },
        indent=2,
    )


def _head(plan: Plan) -> list[str]:
    machines = plan.machines
    serving = f", and {plan.serving_gpus} sample" if plan.serving_gpus else ""
    lines = [
        f"of {plan.training_gpus + plan.serving_gpus} x {machines.gpu_gib:g} GiB, "
        f"{plan.training_gpus} train ({machines.sharding}){serving}",
        f"micro-batches of {plan.micro_batch} tokens, prompt and response up to {plan.row_tokens}",
        f"policy: {_described(plan.policy)}",
    ]
    if plan.critic is not None:
        lines.append(f"critic: {_described(plan.critic)}")
    return lines


def _described(model: Skeleton) -> str:
    return f"{model.elements:,} parameters, {model.trainable:,} of them trainable"


def _items(plan: Plan) -> list[str]:
    """Rows of the table: what some phase holds."""
    held = {item for phase in plan.phases for item, size in phase.items.items() if size}
    assert held <= set(_ORDER), held - set(_ORDER)
    return [item for item in _ORDER if item in held]


_ORDER = (
    "policy parameters",
    "policy gradients",
    "policy optimizer",
    "critic parameters",
    "critic gradients",
    "critic optimizer",
    "reference parameters",
    "reward models",
    "buffers",
    "bfloat16 copies of weights",
    "activations",
    "logits",
    "optimizer's step",
    "sampler weights",
    "KV cache",
    "sampler workspace",
    "sleeping sampler",
    "critic's engine",
    "partner's engine",
    "sync bucket",
    "CUDA and NCCL",
    "fragmentation",
)


def _sampling(plan: Plan) -> list[str]:
    engines = [("one engine", plan.sampler, plan.row_tokens)]
    engines += [(f"the {second.item}", second.sampler, second.row) for second in plan.seconds]
    return [
        f"KV cache of {name}: {sampler.cache_tokens:,} tokens, {_responses(sampler, row):,} responses of {row} at once "
        f"(limit {sampler.rows})"
        for name, sampler, row in engines
    ]


def _responses(sampler: Sampler, row: int) -> int:
    return min(sampler.rows, sampler.cache_tokens // row)


def _host(plan: Plan) -> str:
    return (
        f"main memory of a machine: {_gib(plan.host_start)} GiB while models are loaded, {_gib(plan.host)} GiB of "
        "training state afterwards"
    )


def _end(plan: Plan, ways_out: Sequence[WayOut]) -> list[Text]:
    if plan.fits:
        return [Text("fits", style="bold green")]
    lines = [Text("does not fit", style="bold red")]
    lines += [Text(f"  {problem}") for problem in plan.problems]
    lines += [
        Text(f"way out: {' '.join(way.changes)}  (then {_gib(way.highest)} GiB)")
        for way in ways_out
    ]
    if not ways_out:
        lines.append(
            Text(
                "no setting makes it fit: more GPUs, larger ones, or a smaller model", style="bold"
            )
        )
    return lines


def _counts(model: Skeleton) -> dict[str, int]:
    return {"parameters": model.elements, "trainable": model.trainable}


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
