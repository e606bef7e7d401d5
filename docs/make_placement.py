"""Write the tables of docs/placement.md from the calculator: `python docs/make_placement.py`.

Every number between the markers of that page comes from the command shown beside it.
"""

import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmac.config import load_recipe
from llmac.placement.plan import Machines, Phase, Plan, plan
from llmac.placement.report import show
from llmac.placement.sampling import GIB
from llmac.placement.sharding import Sharding
from llmac.placement.ways_out import ways_out

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "placement.md"
GPU_GIB = 80
FLAGS = {
    Sharding.DDP: [],
    Sharding.ZERO1: ["--zero", "1"],
    Sharding.ZERO2: ["--zero", "2"],
    Sharding.ZERO3: ["--zero", "3"],
    Sharding.ZERO3_OFFLOAD: ["--offload"],
    Sharding.FSDP2: ["--fsdp2"],
}
UNTRAINED = ("critic.init=policy",)
LENGTHS = ("data.max_prompt_tokens=512",)
ADAPTERS = ("model.lora.r=16", "critic.lora=true")
SERVER = ("rollout.engine=vllm_server",)
BFLOAT16 = ("model.dtype=bfloat16", "model.compute_dtype=null")
ELSEWHERE = (
    *SERVER,
    "rollout.servers=[http://b:8000, http://b:8001]",
    "rollout.tensor_parallel_size=4",
)
GROUPS = {
    "policy": ("policy parameters", "policy gradients", "policy optimizer"),
    "critic": ("critic parameters", "critic gradients", "critic optimizer"),
    "reference": ("reference parameters",),
    "passes": ("activations", "logits", "bfloat16 copies of weights", "optimizer's step"),
    "buffers": ("buffers", "sync bucket"),
    "sampler": ("sampler weights", "KV cache", "sampler workspace", "sleeping sampler"),
    "second engine": ("critic's engine", "partner's engine"),
    "rest": ("CUDA and NCCL", "fragmentation"),
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One way to run one model on some GPUs."""

    model: str
    algorithm: str
    gpus: int
    sharding: Sharding
    nodes: int = 1
    settings: tuple[str, ...] = ()
    bfloat16: bool = False
    """Bfloat16 weights instead of float32 ones under autocast."""

    @property
    def recipe(self) -> str:
        task = "math" if self.algorithm == "genac" else "gsm8k"
        return f"recipes/{task}_{self.algorithm}.yaml"

    def overrides(self, name: str) -> list[str]:
        precision = BFLOAT16 if self.bfloat16 else ()
        lengths = () if self.algorithm == "genac" else LENGTHS
        return [f"model.name={name}", *precision, *lengths, *self.settings]

    def planned(self, name: str) -> list[str]:
        """With a critic whose shape is known before the stages that make it."""
        return [*self.overrides(name), *(UNTRAINED if self.algorithm == "genac" else ())]

    def plan(self) -> Plan:
        recipe = load_recipe(ROOT / self.recipe, self.planned(str(ROOT / self._folder)))
        return plan(recipe, self._machines())

    def printed(self) -> str:
        """What the command prints."""
        recipe = load_recipe(ROOT / self.recipe, self.planned(str(ROOT / self._folder)))
        out = io.StringIO()
        show(self.plan(), ways_out(recipe, self._machines()), file=out)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def command(self) -> str:
        nodes = ["--nodes", str(self.nodes)] if self.nodes > 1 else []
        words = ["llmac", "plan", self.recipe, *self.planned(self._folder)]
        words += ["--gpus", str(self.gpus), "--gpu-memory", str(GPU_GIB), *nodes]
        return shlex.join([*words, *FLAGS[self.sharding]])

    def launch(self) -> str:
        training = self.plan().training_gpus
        name = "single" if training == 1 else str(self.sharding)
        words = ["accelerate", "launch", "--config_file", f"recipes/accelerate/{name}.yaml"]
        words += ["--num_processes", str(training)] if training > 1 else []
        if self.nodes > 1:
            words += ["--num_machines", str(self.nodes), "--machine_rank", "<0 or 1>"]
            words += ["--main_process_ip", "<first machine>", "--main_process_port", "29500"]
        words += ["recipes/train.py", self.recipe, *self.overrides(self._on_hub)]
        return shlex.join(words)

    @property
    def _on_hub(self) -> str:
        return f"Qwen/{self.model}-Base" if "Qwen" in self.model else f"Qwen/Qwen2.5-{self.model}"

    @property
    def _folder(self) -> str:
        return f"docs/placement_models/{self.model}"

    def _machines(self) -> Machines:
        return Machines(gpus=self.gpus, nodes=self.nodes, gpu_gib=GPU_GIB, sharding=self.sharding)


PLACEMENTS = {
    "1 GPU": [
        Placement(model="1.5B", algorithm="grpo", gpus=1, sharding=Sharding.DDP),
        Placement(model="1.5B", algorithm="ppo", gpus=1, sharding=Sharding.DDP),
        Placement(
            model="7B", algorithm="grpo", gpus=1, sharding=Sharding.DDP, settings=ADAPTERS[:1]
        ),
        Placement(
            model="7B",
            algorithm="ppo",
            gpus=1,
            sharding=Sharding.DDP,
            settings=ADAPTERS,
            bfloat16=True,
        ),
    ],
    "2 GPUs, colocated": [
        Placement(model="1.5B", algorithm="grpo", gpus=2, sharding=Sharding.ZERO1),
        Placement(model="1.5B", algorithm="ppo", gpus=2, sharding=Sharding.ZERO1),
        Placement(model="7B", algorithm="grpo", gpus=2, sharding=Sharding.ZERO3_OFFLOAD),
        Placement(
            model="7B",
            algorithm="ppo",
            gpus=2,
            sharding=Sharding.ZERO3_OFFLOAD,
            bfloat16=True,
        ),
    ],
    "2 GPUs, split: one trains, one samples": [
        Placement(model="1.5B", algorithm=algorithm, gpus=2, sharding=Sharding.DDP, settings=SERVER)
        for algorithm in ("grpo", "ppo")
    ],
    "8 GPUs, colocated": [
        Placement(model="1.5B", algorithm="grpo", gpus=8, sharding=Sharding.ZERO1),
        Placement(model="1.5B", algorithm="ppo", gpus=8, sharding=Sharding.ZERO1),
        Placement(model="7B", algorithm="grpo", gpus=8, sharding=Sharding.ZERO3),
        Placement(model="7B", algorithm="ppo", gpus=8, sharding=Sharding.ZERO3),
        Placement(model="7B", algorithm="ppo", gpus=8, sharding=Sharding.FSDP2),
    ],
    "8 GPUs, split: four train, four sample": [
        Placement(
            model="7B",
            algorithm=algorithm,
            gpus=8,
            sharding=Sharding.ZERO3,
            settings=(*SERVER, "rollout.server_count=4"),
            bfloat16=algorithm == "ppo",
        )
        for algorithm in ("grpo", "ppo")
    ],
    "2 x 8 GPUs, colocated": [
        Placement(model="7B", algorithm="ppo", gpus=8, nodes=2, sharding=Sharding.ZERO3),
        Placement(
            model="32B",
            algorithm="grpo",
            gpus=8,
            nodes=2,
            sharding=Sharding.ZERO3,
            settings=("rollout.tensor_parallel_size=4",),
            bfloat16=True,
        ),
        Placement(
            model="32B",
            algorithm="ppo",
            gpus=8,
            nodes=2,
            sharding=Sharding.ZERO3_OFFLOAD,
            settings=("rollout.tensor_parallel_size=4",),
            bfloat16=True,
        ),
    ],
    "2 x 8 GPUs, split: one machine trains, the other (b) samples on two servers of four GPUs": [
        Placement(
            model="32B",
            algorithm=algorithm,
            gpus=8,
            sharding=Sharding.ZERO3_OFFLOAD,
            settings=ELSEWHERE,
            bfloat16=True,
        )
        for algorithm in ("grpo", "ppo")
    ],
    "8 GPUs, a critic that writes: GenAC with two models of 8B, solutions of up to 8,192 tokens": [
        Placement(
            model="Qwen3-8B",
            algorithm="genac",
            gpus=8,
            sharding=Sharding.ZERO3,
            settings=("critic.engine=shared", "rollout.gpu_memory_utilization=0.45"),
        ),
        Placement(
            model="Qwen3-8B",
            algorithm="genac",
            gpus=8,
            sharding=Sharding.ZERO3_OFFLOAD,
            settings=("critic.engine=own", "rollout.gpu_memory_utilization=0.4"),
        ),
    ],
}
WRITTEN_OUT = [
    PLACEMENTS["8 GPUs, colocated"][3],
    PLACEMENTS["2 x 8 GPUs, colocated"][1],
    Placement(model="7B", algorithm="ppo", gpus=2, sharding=Sharding.DDP),
    Placement(
        model="Qwen3-8B",
        algorithm="genac",
        gpus=8,
        sharding=Sharding.ZERO3,
        settings=("critic.engine=own", "rollout.gpu_memory_utilization=0.3"),
    ),
]


def sections() -> dict[str, str]:
    """Marker -> what belongs between its two comments."""
    return {"placements": "\n".join(_placements()), "examples": "\n".join(_examples())}


def page(text: str) -> str:
    """The page with its generated sections made anew."""
    for marker, body in sections().items():
        begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = pattern.sub(lambda _, b=begin, m=body, e=end: f"{b}\n{m}\n{e}", text)
    return text


def _placements() -> Iterator[str]:
    number = 0
    for title, placements in PLACEMENTS.items():
        yield f"\n### {title}\n"
        yield f"| | model | algorithm | sharding | weights | fullest phase | {' | '.join(GROUPS)} | total | host |"
        yield f"|---|---|---|---|---|---|{'---:|' * (len(GROUPS) + 2)}"
        commands = []
        for placement in placements:
            number += 1
            found = placement.plan()
            assert found.fits, (placement, found.problems)
            for phase in _fullest(found):
                yield _row(number, placement, phase, found)
            commands += [f"# {number}", placement.command(), placement.launch()]
        yield "\n```bash"
        yield "\n".join(commands)
        yield "```"


def _fullest(found: Plan) -> list[Phase]:
    """The fullest phase of the GPUs that train, and the server's."""
    servers = [phase for phase in found.phases if phase.name == "server"]
    training = [phase for phase in found.phases if phase.name != "server"]
    return [max(training, key=lambda phase: phase.total), *servers]


def _row(number: int, placement: Placement, phase: Phase, found: Plan) -> str:
    adapters = ", LoRA" if "model.lora.r=16" in placement.settings else ""
    weights = ("bfloat16" if placement.bfloat16 else "float32") + adapters
    sizes = [sum(phase.items.get(item, 0) for item in items) for items in GROUPS.values()]
    assert sum(sizes) == phase.total
    host = max(found.host, found.host_start) if phase.name != "server" else 0
    cells = [number, placement.model, placement.algorithm, placement.sharding, weights, phase.name]
    cells += [_gib(size) for size in (*sizes, phase.total, host)]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _examples() -> Iterator[str]:
    for placement in WRITTEN_OUT:
        yield f"\n```text\n$ {placement.command()}\n{placement.printed()}\n```"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size else ""


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
