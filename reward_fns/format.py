"""Format: 1.0 for one <think>...</think> followed by one <answer>...</answer>, else 0.0.

Looks at nothing but the response, so it suits any dataset. Give it a small weight beside a function that checks the
answer: a policy that is paid for format alone learns to fill in the form.
"""

import re

FORM = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def reward(prompt, response):
    """Both parts once, in this order, neither empty, and nothing outside them.

    Many chat templates write the opening <think> into the prompt; then the response begins inside it.
    """
    begun = text_of(prompt).rstrip().endswith("<think>")
    text = "<think>" + response if begun else response
    form = FORM.fullmatch(text)
    if form is None or any(text.count(tag) != 1 for tag in TAGS):
        return 0.0
    return 1.0 if all(part.strip() for part in form.groups()) else 0.0


def text_of(prompt):
    """A prompt is a string, or a list of chat messages."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
