"""Reward of the quickstart: is the end of a worked sum right?

    prompt    4+8+6-6+1-9+5=
    response  4+8=12;12+6=18;18-6=12;12+1=13;13-9=4;4+5=9
    answer    9

Only the final number counts; which step went wrong is for the algorithm to find out.
"""

import re


def reward(prompt: str, response: str, answer: str, **columns: object) -> float:
    """1 if what follows the last `=` of the response is the answer, else 0.

    >>> reward("8+6-1=", "8+6=14;14-1=13", "13"), reward("8+6-1=", "8+6=4;4-1=3", "13")
    (1.0, 0.0)
    >>> reward("8+6-1=", "13", "13")  # no equation at all
    0.0
    """
    _, equals, result = response.rpartition("=")
    return float(bool(equals) and result.strip() == answer)


def worked(prompt: str, response: str, answer: str, **columns: object) -> float:
    """1 if the response is the sum worked without any mistake, else 0: mistakes that cancel do not count as right.

    >>> worked("8+6-1=", "8+6=14;14-1=13", "13"), worked("8+6-1=", "8+6=12;12-1=13", "13")
    (1.0, 0.0)
    """
    value, *changes = (int(number) for number in re.findall(r"[+-]?\d+", prompt))
    equations: list[str] = []
    for change in changes:
        equations.append(f"{value}{change:+d}={value + change}")
        value += change
    return float(response.strip() == ";".join(equations))
