"""Where rewards come from: user functions, adapters for other trainers' functions, and reward models.

`loader.py`        "reward_fns/gsm8k.py:reward" -> the function; the same resolver serves algorithms and critics
`contracts.py`     which of the two contracts a function follows, and the arguments of its next call
`scoring.py`       `Rewards`: trajectories in, rewarded trajectories and counters out (a `core.protocols.Scorer`)
`adapters.py`      functions written for verl and OpenRLHF, by declaration
`reward_model.py`  a sequence-classification model as a reward function (the only file here importing transformers)
`event_loop.py`    the background event loop that async functions share

Read `contracts.py` first. May import `core` and `errors`. To add an adapter: a function in `adapters.py` that turns the
foreign function into one of the two contracts, and a line in its registry.
"""
