"""Competition math: 1.0 if the last \\boxed{} of the response equals that of the dataset's solution, else 0.0.

Asks for the column `solution`, a worked solution with its answer in \\boxed{}, as the MATH dataset has it. Equality is
Math-Verify's: 1/2, 0.5 and \\frac{1}{2} are the same. Needs `pip install math-verify`. It stops itself after five
seconds with a signal, which works in the main thread only: not for `async` wrappers.
"""

from math_verify import parse, verify

BOX = "\\boxed{"


def reward(prompt, response, solution, **columns):
    """Compare boxed answers; a response without one is wrong."""
    expected = boxed(str(solution))
    if expected is None:
        return None  # nothing to compare with: this function does not apply
    found = boxed(response)
    return 0.0 if found is None else float(same(expected, found))


def boxed(text):
    """What stands in the last \\boxed{}, braces balanced; None if there is none or it never closes."""
    start = text.rfind(BOX)
    depth = 0
    for place in range(start + len(BOX) - 1, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(BOX) : place].strip()
    return None


def same(expected, found):
    """Whether two answers are the same in mathematics, or letter by letter."""
    if found == expected:
        return True
    if len(found) > 400:
        return False  # no answer is that long, and reading it may take long
    return bool(verify(parse(f"${expected}$"), parse(f"${found}$")))
