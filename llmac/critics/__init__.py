"""Critics room: who says V(s). Each file holds one critic behind `core.protocols.Critic`.

Heads on a language model: `value_head.py` (scalar) and `distribution_heads.py` are settings, `head_config.py` what they
share, `head_critic.py` the live critic behind all of them. Of log-probs only: `surprise.py`. Of prompts only:
`baselines.py` (nothing is learned) and `prompt_value.py` (`in_context.py` learns), on what `outcomes.py` finds. By
sampling: `monte_carlo.py`, on `continuing.py`. In words: `generative.py`, over the other `generative_` files. Of
siblings that begin alike: `prefix_tree.py`. Values are in the unit of the rewards, at the positions asked, and do not
look at the action that follows: `group_mean` and `prefix_tree` alone contain the response's own outcome. To add one: a
frozen dataclass with its settings (`refusals.py` says what cannot work) and a method `build(...)`, and one line below;
a new head also needs its place in `models/value_heads.py`. How good one is: `examine.py`, on `states.py` whose true
values are known.
"""

CRITICS: dict[str, str] = {
    "value_head": "llmac.critics.value_head:ValueHeadConfig",
    "bernoulli": "llmac.critics.distribution_heads:BernoulliConfig",
    "hl_gauss": "llmac.critics.distribution_heads:HLGaussConfig",
    "two_hot": "llmac.critics.distribution_heads:TwoHotConfig",
    "c51": "llmac.critics.distribution_heads:C51Config",
    "quantile": "llmac.critics.distribution_heads:QuantileConfig",
    "gaussian": "llmac.critics.distribution_heads:GaussianConfig",
    "outcome_classes": "llmac.critics.distribution_heads:OutcomeClassesConfig",
    "code_outcomes": "llmac.critics.distribution_heads:CodeOutcomesConfig",
    "group_mean": "llmac.critics.baselines:GroupMeanConfig",
    "prefix_tree": "llmac.critics.prefix_tree:PrefixTreeConfig",
    "leave_one_out": "llmac.critics.baselines:LeaveOneOutConfig",
    "prompt_value": "llmac.critics.prompt_value:PromptValueConfig",
    "surprise": "llmac.critics.surprise:SurpriseConfig",
    "running_mean": "llmac.critics.baselines:RunningMeanConfig",
    "monte_carlo": "llmac.critics.monte_carlo:MonteCarloConfig",
    "tree_mean": "llmac.critics.trees:TreeMeanConfig",
    "generative": "llmac.critics.generative:GenerativeConfig",
}
