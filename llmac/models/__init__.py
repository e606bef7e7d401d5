"""Models room: transformers and peft, nothing distributed, nothing about algorithms.

`loading.py` names to live models · `packing.py` trajectories to model inputs and micro-batches ·
`trie.py` rows that share prefixes · `tree_attention.py` attention along their paths · `path_probe.py` its proof ·
`logprobs.py` log-probabilities without a [tokens, vocabulary] tensor · `policy.py` the module that is trained ·
`value_model.py` a backbone with a value head from `value_heads.py` · `value_init.py` a reward model as its start.
Only this room knows where a state's hidden vector sits.
"""
