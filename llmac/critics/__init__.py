"""Critics room: who says V(s). Each file holds one critic behind `core.protocols.Critic`.

`value_head.py` a language model with a scalar head. Values are in the unit of the rewards, at the positions asked
for, and never look at the action that follows. To add one: a frozen dataclass with its settings and a method
`build(...)`, and one line below.
"""

CRITICS: dict[str, str] = {
    "value_head": "llmac.critics.value_head:ValueHeadConfig",
}
