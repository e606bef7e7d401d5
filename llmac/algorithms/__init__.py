"""Cards: one paper, one frozen dataclass, one file. Pure: imports `core` and nothing else.

A card is five answers: `plan` (how responses are made), `segments` (where V is asked),
`default_critic` (who says V), `credit` (who deserves what) and `policy_loss` (how the policy
moves). Its fields are its hyper-parameters; the recipe's `algorithm:` keys are exactly these
fields. Read `base.py` first, then `grpo.py` (no critic) and `ppo.py` (critic).

To add one: copy the nearest card, change the cell that differs, add a line to `ALGORITHMS` and a
row to `docs/algorithms.md`; tests are parametrised over the registry. Out of tree: `algorithm:
{name: ./foo.py:Foo}`.
"""

ALGORITHMS: dict[str, str] = {
    "ppo": "llmac.algorithms.ppo:PPO",
    "vapo": "llmac.algorithms.vapo:VAPO",
    "t_ppo": "llmac.algorithms.t_ppo:TPPO",
    "a2c": "llmac.algorithms.a2c:A2C",
    "vineppo": "llmac.algorithms.vineppo:VinePPO",
    "imitation": "llmac.algorithms.imitation:Imitation",
    "rerank_distill": "llmac.algorithms.rerank_distill:RerankDistill",
    "genac": "llmac.algorithms.genac:GenAC",
    "spo_chain": "llmac.algorithms.spo_chain:SPOChain",
    "spo_tree": "llmac.algorithms.spo_tree:SPOTree",
    "safe": "llmac.algorithms.safe:SAFE",
    "sft": "llmac.algorithms.sft:SFT",
    "dapo_step": "llmac.algorithms.dapo_step:DAPOStep",
    "grpo": "llmac.algorithms.grpo:GRPO",
    "dr_grpo": "llmac.algorithms.dr_grpo:DrGRPO",
    "dapo": "llmac.algorithms.dapo:DAPO",
    "tempo": "llmac.algorithms.tempo:TEMPO",
    "rloo": "llmac.algorithms.rloo:RLOO",
    "pacs": "llmac.algorithms.pacs:PACS",
    "critique_rl": "llmac.algorithms.critique_rl:CritiqueRL",
    "rl4f": "llmac.algorithms.rl4f:RL4F",
    "critique_loop": "llmac.algorithms.critique_loop:CritiqueLoop",
    "critique_filter": "llmac.algorithms.critique_filter:CritiqueFilter",
    "coderl": "llmac.algorithms.coderl:CodeRL",
    "reinforce_pp": "llmac.algorithms.reinforce_pp:ReinforcePP",
    "reinforce_pp_baseline": "llmac.algorithms.reinforce_pp:ReinforcePPBaseline",
    "gspo": "llmac.algorithms.gspo:GSPO",
    "cispo": "llmac.algorithms.cispo:CISPO",
}
"""Name in a recipe -> "module:Class", imported at use."""
