"""Guided decoding: a trained value model, or another critic, chooses among what a policy might say.

Whole responses: `best_of_n`, `weighted_vote`, `majority_vote` (choosing.py). Beginnings of responses: `beam` (beam.py).
Tokens: `token_guided`, and without a critic `transfer` (tokenwise.py). The first four work with any `RolloutEngine`,
the last two with transformers models. Who may be asked for values: `values.py`; how answers are found in texts:
`answers.py`; whether a critic was trained on this policy: `provenance.py`. The arithmetic is `core/guidance.py`.

May be imported here: core, config, data, engines, models, rewards. Read choosing.py first. A new way to
choose is a function that returns `Decoded`s, and a line in `llmac/generate.py`.
"""

from llmac.decoding.beam import beam
from llmac.decoding.candidates import Candidate, Decoded
from llmac.decoding.choosing import best_of_n, majority_vote, weighted_vote
from llmac.decoding.tokenwise import token_guided, transfer
from llmac.decoding.values import SaysValues, State

__all__ = [
    "Candidate",
    "Decoded",
    "SaysValues",
    "State",
    "beam",
    "best_of_n",
    "majority_vote",
    "token_guided",
    "transfer",
    "weighted_vote",
]
