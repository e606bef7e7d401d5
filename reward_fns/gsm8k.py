"""Grade-school math: 1.0 if the final number of the response equals that of the dataset's answer, else 0.0.

Asks for the column `answer`, as in openai/gsm8k (the number after ####) or a bare number.
The final number is, in this order: in the last \\boxed{}, after the last ####, after the last "answer is" or line
beginning with "A:", the last number of all. Currency, units, percent and thousands separators do not matter.
"""

import re
from fractions import Fraction

NUMBER = re.compile(
    r"(?:(?<![\w)}])-(?=[\\$.\d]))?(?:\\?\$\s?)?"  # a minus sign, unless it subtracts or begins a list; currency
    r"(?:\d{1,3}(?:\\?,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+|/[1-9]\d*)?"
)
MARKED = (
    re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}"),
    re.compile(r"####\s*(?=[-$\d.])([^\n]*)"),
    re.compile(r"(?:answer is|answer:|^A:)([^\n]*)", re.IGNORECASE | re.MULTILINE),
)


def reward(prompt, response, answer, **columns):
    """Compare numbers, so that 18, 18.00 and $18 are the same."""
    expected = final_number(str(answer))
    if expected is None:
        return None  # nothing to compare with: this function does not apply
    return 1.0 if final_number(response) == expected else 0.0


def final_number(text):
    """The number a text ends up with, exactly, or None."""
    text = re.sub(r"\\d?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    for pattern in MARKED:
        marked = pattern.findall(text)
        if marked:
            # "x = 3 + 4 = 7 apples in 2 days" is 7: the first number after the last equals sign.
            numbers = NUMBER.findall(marked[-1].rpartition("=")[2])
            return as_fraction(numbers[0]) if numbers else None
    numbers = NUMBER.findall(text)
    return as_fraction(numbers[-1]) if numbers else None


def as_fraction(number):
    """'$1,234.50' is 2469/2."""
    if len(number) > 100:
        return None  # a model that repeats digits without end; Python refuses to read such numbers
    return Fraction(re.sub(r"[^\d./-]", "", number))
