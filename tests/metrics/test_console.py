"""One line a step where nobody watches; a bar where somebody does; nothing taken for markup."""

import io
import logging

from llmac.console import Console, ConsoleHandler

VALUES = {
    "reward/mean": 0.5125,
    "response_length/mean": 41.24,
    "actor/ppo_kl": 0.00212,
    "actor/ref_kl": 0.0314,
    "critic/vf_explained_var": 0.43,
    "perf/throughput": 10450.2,
    "timing_s/step": 2.0,
    "eval/held_out/pass@1": 0.71,
    "eval/held_out/pass@2": 0.9,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gets_one_plain_line_a_step():
    file = io.StringIO()
    console = Console(80, file=file)
    console.begin(11)
    console.step(12, VALUES)
    console.step(13, {"reward/mean": 0.6, "actor/ppo_kl": 0.002, "timing_s/step": 4.0})
    console.close()
    assert file.getvalue().splitlines() == [
        "step 12/80 | reward 0.512 | length 41.2 | KL to reference 0.031 | value EV 0.43 | "
        "tokens/s 10,450 | held-out accuracy 0.710 | time left 2m 16s",  # 68 steps x 2 s
        # 67 steps x mean(2 s, 4 s)
        "step 13/80 | reward 0.600 | KL to old policy 0.002 | time left 3m 21s",
    ]


def test_the_last_step_and_a_step_without_numbers_have_lines_too():
    file = io.StringIO()
    console = Console(2, file=file)
    console.step(0, {"timing_s/step": 1.0})
    console.step(2, {"timing_s/step": 1.0, "reward/mean": float("nan")})
    assert file.getvalue().splitlines() == ["step 0/2", "step 2/2 | reward nan"]


def test_a_terminal_gets_a_bar_that_keeps_the_last_known_accuracy(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    file = Terminal()
    console = Console(80, file=file)
    console.begin(0)
    console.step(12, VALUES)
    console.step(13, {"reward/mean": 0.6})
    console.close()
    console.close()
    shown = file.getvalue()
    last = shown[shown.rindex("13/80") :]
    for word in ("reward", "0.600", "held-out accuracy", "0.710"):
        assert word in last


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    Console(80, file=file).step(1, {"reward/mean": 1.0})
    assert file.getvalue() == "step 1/80 | reward 1.000\n"


def test_messages_are_neither_markup_nor_terminal_commands():
    file = io.StringIO()
    Console(1, file=file).line("[bold]not bold[/] :smile: \x1b[2J\x07 " + "x" * 200)
    assert file.getvalue() == r"[bold]not bold[/] :smile: \x1b[2J\x07 " + "x" * 200 + "\n"


def test_log_messages_go_above_the_bar():
    file = Terminal()
    console = Console(80, file=file, live=True)
    console.begin(0)
    logger = logging.getLogger("llmac.tests.console")
    handler = ConsoleHandler(console)
    logger.addHandler(handler)
    logger.warning("reward [f] is 0")
    logger.removeHandler(handler)
    console.close()
    assert "reward [f] is 0\n" in file.getvalue()
