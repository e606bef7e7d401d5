"""Pre-train a recipe's critic: `accelerate launch recipes/value_pretrain.py <recipe.yaml> <rollouts.parquet> ...`.

The arguments are those of `llmac value-pretrain`, which is the same in one process.
"""

import sys

from llmac.cli import main

if __name__ == "__main__":
    sys.exit(main(["value-pretrain", *sys.argv[1:]]))
