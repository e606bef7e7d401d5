"""Models room: transformers and peft, nothing distributed, nothing about algorithms.

`loading.py` names to live models · `packing.py` trajectories to padded rows and micro-batches ·
`logprobs.py` log-probabilities without a [tokens, vocabulary] tensor · `policy.py` the module that is trained ·
`value_model.py` a backbone with a value head from `value_heads.py` · `value_init.py` a reward model as its start.
Only this room knows where a state's hidden vector sits.
"""
