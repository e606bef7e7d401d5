"""Train one recipe: `accelerate launch recipes/train.py recipes/<name>.yaml key.sub=value ...`."""

import logging
import sys

from llmac.errors import LlmacError


def main(arguments: list[str]) -> int:
    """Train and return the exit code: 0 done, 1 a mistake explained in one message, 2 wrong usage."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        sys.stderr.write(f"{__doc__}\nSee `llmac show recipes/<name>.yaml` for every key.\n")
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    try:
        from llmac.config import load_recipe

        recipe = load_recipe(arguments[0], arguments[1:])
        from transformers.utils import logging as transformers_logging

        from llmac.api import run

        transformers_logging.disable_progress_bar()  # it would tear the bar of the run
        run(recipe)
    except LlmacError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
