"""The pure room: reinforcement-learning arithmetic on tensors. Imports torch and nothing else of weight.

Notation, used everywhere in the project:
    B rows (responses) · T response tokens, padded · G group size · S segments · V vocabulary.
    State s_t = prompt + response[:t]; action a_t = response[t]; rewards[t] arrives after a_t;
    values[t] = V(s_t), read *before* a_t is sampled; bootstrap = V(s_T), 0 if the response terminated.
    Every per-token tensor is [B, T] on the response axis.
Masks are bool and True means "counts": `action_mask` = sampled by the policy (False: injected or padding),
    `policy_mask` = enters the policy loss, `value_mask` = enters the critic loss.
Log-probabilities are named by who computed them: `logprobs` (policy now), `old_logprobs` (trainer's policy at
    collection), `ref_logprobs` (frozen reference), `sampler_logprobs` (the engine that sampled).

Read `types.py` first, then `returns.py` and `losses.py`. To add a function: pure, typed, with its formula, its paper
and a running example in the docstring, and a law in `tests/core/`.
"""
