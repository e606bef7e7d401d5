"""Length: 0 up to a soft limit, then falling linearly to -1 at the hard limit, and -1 beyond.

Lengths are in tokens, the end-of-sequence token included. "Soft overlong punishment" of DAPO (Yu et al. 2025,
arXiv:2503.14476, eq. 13), which uses 16384 and 4096. Set HARD_LIMIT to your rollout.max_new_tokens.
"""

HARD_LIMIT = 512
BUFFER = 128


def reward(prompt, response, response_ids):
    """Minus the part of the buffer that is used, at most 1."""
    used = len(response_ids) - (HARD_LIMIT - BUFFER)
    return -min(max(used / BUFFER, 0.0), 1.0)
