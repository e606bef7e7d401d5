"""docs/metrics.md and the code name the same metrics."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = "actor|critic|reward|response_length|rollout|timing_s|perf|eval|progress"
# These read metrics, or put a room in front of a part of a name.
READERS = {"completions.py", "console.py", "curves.py", "evaluate.py"}


def documented():
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
    assert len(names) == len(set(names)) > 40
    return [name for name in names if name != "step"]


def text_of(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "<>" for part in node.values)
    return None


def written(path):
    """Every string of the file in the form of a metric's name, with <> for what is filled in."""
    texts = {text_of(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))}
    return {text for text in texts if text and re.fullmatch(r"(\w+|<>)(/([\w@]|<>)+)+", text)}


def test_every_metric_in_the_code_is_in_the_table():
    known = {re.sub("<.*?>", "<>", name) for name in documented()}
    missing = {
        f"{name} ({path.relative_to(ROOT)})"
        for path in sorted((ROOT / "llmac").rglob("*.py"))
        if path.name not in READERS
        for name in written(path)
        if re.match(f"({ROOMS})/", name)
        and name not in known
        and not any(re.fullmatch(name.replace("<>", "[^/]+"), other) for other in known)
    }
    assert not missing


def test_every_metric_in_the_table_is_in_the_code():
    names = {name for path in (ROOT / "llmac").rglob("*.py") for name in written(path)}
    patterns = [re.escape(name).replace("<>", ".+") for name in names if name.strip("<>/")]
    unknown = [
        name
        for name in documented()
        if not any(re.fullmatch(pattern, re.sub("<(.*?)>", r"\1", name)) for pattern in patterns)
    ]
    assert not unknown
