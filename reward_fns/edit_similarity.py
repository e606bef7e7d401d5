"""Texts that should come out exactly: how near is the response to the gold text, character by character?

    prompt    sort: bee ant cat
    response  ant cat bee
    gold      ant bee cat

The measure of RL4F's word sorting (Akyürek et al. 2023, arXiv:2305.08844).
"""


def reward(prompt: str, response: str, gold: str, **columns: object) -> float:
    """1 - distance / length of the longer text, of letters, digits and single spaces in lower case; 1 is exact.

    >>> round(reward("", "bee ant cat", "ant bee cat"), 4), reward("", "Ant, bee, cat.", "ant bee cat")
    (0.4545, 1.0)
    """
    said, wanted = _plain(response), _plain(gold)
    longer = max(len(said), len(wanted))
    return 1 - distance(said, wanted) / longer if longer else 1.0


def distance(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of a character (Levenshtein).

    >>> distance("kitten", "sitting"), distance("", "ab")
    (3, 2)
    """
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, wanted in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != wanted))
    return row[-1]


def _plain(text: str) -> str:
    kept = "".join(x for x in text.lower() if x.isalnum() or x.isspace())
    return " ".join(kept.split())
