"""The quickstart's generative critic: its reasoning is right, its scores are chances, its words survive a folder."""

import dataclasses
import importlib.util
import json
import random
import re
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from llmac.critics.generative_prompt import CriticTemplate

from .conftest import RECIPE


@pytest.fixture(scope="module")
def genac(quickstart):
    """recipes/quickstart_genac.py; it imports its neighbour by its bare name."""
    path = RECIPE.parent / "quickstart_genac.py"
    spec = importlib.util.spec_from_file_location("quickstart_genac_recipe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("quickstart", quickstart)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def student(genac, quickstart):
    return genac.Student(0.5, random.Random(0), quickstart.SIX_STEPS)


def sums(quickstart, count=200, seed=0):
    rng = random.Random(seed)
    return [quickstart.random_sum(rng) for _ in range(count)]


def test_right_work_is_right_up_to_every_character(genac, quickstart):
    for problem in sums(quickstart, 30):
        solution = problem.worked(random.Random(0), bug_rate=0.0)
        seen = [genac.check(problem, solution[:end]) for end in range(len(solution) + 1)]
        assert all(state.right for state in seen)
        assert seen[0].critical == problem.critical
        assert seen[-1].critical == 0
        assert seen[-1].reasoning == "y"


def test_the_reasoning_is_the_rest_of_the_right_solution(genac, quickstart):
    for problem in sums(quickstart):
        solution = problem.worked(random.Random(0), bug_rate=0.0)
        steps = [re.fullmatch(r"(\d+)([+-]\d)=(\d+)", e).groups() for e in solution.split(";")]
        hard = [  # a carry or a borrow shows in the tens
            int(value) // 10 != int(result) // 10 for value, _, result in steps
        ]
        for done, partial in enumerate(genac.beginnings(solution)):
            rest = zip(steps[done:], hard[done:], strict=True)
            expected = "".join(f"{op}{result[-1]}{'!' * h}" for (_, op, result), h in rest)
            assert genac.check(problem, partial).reasoning == "y" + expected


def test_every_mistake_is_seen_as_soon_as_it_is_written(genac, quickstart):
    rng = random.Random(1)
    for problem in sums(quickstart):
        right, wrong = (problem.worked(rng, bug_rate=rate) for rate in (0.0, 0.7))
        pairs = enumerate(zip(right, wrong, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        if first is not None and right != wrong:
            assert genac.check(problem, wrong[:first]).right
            assert genac.check(problem, wrong[: first + 1]).reasoning == "n"


def test_more_equations_than_operations_are_a_mistake(genac, quickstart):
    problem = quickstart.Sum(1, (("+", 2), ("+", 3)))
    assert genac.check(problem, "1+2=3;3+3=6").right
    assert not genac.check(problem, "1+2=3;3+3=6;").right


def test_a_settled_result_is_no_risk_any_more(genac, quickstart):
    problem = quickstart.Sum(4, (("+", 8), ("-", 6)))
    assert genac.check(problem, "4+8=").critical == 2
    assert genac.check(problem, "4+8=1").critical == 1
    assert genac.check(problem, "4+8=1") == genac.check(problem, "4+8=12")


def test_a_solution_begins_anew_with_each_equation(genac):
    assert genac.beginnings("4+8=12;12-6=6;6+1=7") == ["", "4+8=12;", "4+8=12;12-6=6;"]


def test_scores_are_chances_of_independent_steps(genac, quickstart, student):
    state = genac.Checked("", right=True, critical=0)
    scores = [student.score(dataclasses.replace(state, critical=count)) for count in range(5)]
    assert scores[0] == 10  # nothing can go wrong
    assert scores[1] in (5, 6)  # one in two, and luck
    assert scores == sorted(scores, reverse=True)
    assert scores[4] <= 2
    assert student.score(genac.Checked("n", right=False, critical=0)) <= 2
    perfect = genac.Student(0.0, random.Random(0), quickstart.SIX_STEPS)
    assert perfect.success_rate == 1.0
    assert {perfect.score(dataclasses.replace(state, critical=n)) for n in range(8)} == {10}


def test_the_percentage_says_whose_solution_it_is(genac, quickstart):
    rng = random.Random(0)
    good, bad = (genac.Student(rate, rng, quickstart.SIX_STEPS) for rate in (0.1, 0.9))
    state = genac.Checked("", right=True, critical=2)
    assert good.success_rate > bad.success_rate + 0.4
    assert good.score(state) >= 7
    assert bad.score(state) <= 2


def test_a_prompt_is_what_the_critic_of_a_run_reads(genac, quickstart):
    told = dict.fromkeys(("low", "high", "tag", "actor", "tokens_used", "tokens_left"))
    read = CriticTemplate(genac.TEMPLATE).write(
        problem="4+8-6=", partial="4+8=12;", success_rate=0.266, attempts=[], **told
    )
    problem = quickstart.Sum(4, (("+", 8), ("-", 6)))
    assert read == genac.prompt_of(problem, "4+8=12;", 0.266) == "4+8-6=4+8=12;?27:"
    assert genac.prompt_of(problem, "", None) == "4+8-6=?:"


def test_prompts_of_one_response_share_all_but_their_ends(genac, quickstart):
    problem = sums(quickstart, 1)[0]
    solution = problem.worked(random.Random(0), bug_rate=0.0)
    for partial in genac.beginnings(solution):
        prompt = genac.prompt_of(problem, partial, 0.27)
        assert prompt.removesuffix("?27:") == problem.prompt + partial


def test_tags_are_one_token_each_after_a_folder_of_this_architecture(genac, quickstart, tmp_path):
    quickstart.make_model().save_pretrained(tmp_path / "policy")
    genac.make_model(tmp_path / "policy").save_pretrained(tmp_path / "critic")
    genac.make_tokenizer().save_pretrained(tmp_path / "critic")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "critic")
    text = "4+8-6=4+8=12;?27:y-66<answer>10</answer>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) - len("answer<>answer</>") + 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(ids) < genac.make_model(tmp_path / "policy").config.vocab_size
    assert ids[:6] == quickstart.make_tokenizer()("4+8-6=")["input_ids"]


def test_the_critic_starts_as_the_policy(genac, quickstart, tmp_path):
    torch.manual_seed(0)
    policy = quickstart.make_model()
    policy.save_pretrained(tmp_path)
    critic = genac.make_model(tmp_path)
    ids = quickstart.make_tokenizer()("4+8-6=4+8=1", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        old, new = policy(ids).logits, critic(ids).logits
    assert critic.config.max_position_embeddings == 160
    assert torch.equal(old, new[..., : old.shape[-1]])


def test_traces_follow_the_seed_and_know_all_kinds_of_states(genac, quickstart, student):
    drawn, again = ([genac.trace(student, random.Random(3)) for _ in range(2)] for _ in range(2))
    assert drawn == again
    rng = random.Random(0)
    found = [genac.trace(student, rng) for _ in range(600)]
    assert all(re.fullmatch(r"(n|y[-+0-9!]*)<answer>\d+</answer>", text) for _, text in found)
    wrong = sum(text.startswith("n") for _, text in found) / len(found)
    assert 0.3 < wrong < 0.7
    at_start = sum("=?" in prompt and prompt.count("=") == 1 for prompt, _ in found)
    assert at_start > 30
    assert {text[-11:] for _, text in found if text[0] == "y" and "!" not in text} == {
        "10</answer>"
    }
    assert len({text.partition(">")[2] for _, text in found if "!" in text}) >= 4
    untold = sum(prompt.endswith("?:") for prompt, _ in found) / len(found)
    assert 0.02 < untold < 0.09
    assert max(len(prompt) for prompt, _ in found) + 40 < genac.CRITIC.context_tokens


def test_a_student_without_bugs_fails_by_slips_alone(genac, quickstart):
    rng = random.Random(0)
    perfect = genac.Student(0.0, rng, quickstart.SIX_STEPS)
    found = [genac.trace(perfect, rng) for _ in range(400)]
    assert {prompt.rpartition("?")[2] for prompt, _ in found} == {"100:", ":"}
    assert all(text.endswith(">10</answer>") for _, text in found if text[0] == "y")
    assert 0.01 < sum(text[0] == "n" for _, text in found) / len(found) < 0.09


def test_longer_sums_are_reasoned_about_without_a_score(genac, quickstart, student):
    rng = random.Random(0)
    longer = dataclasses.replace(quickstart.SIX_STEPS, steps=(7, 9))
    found = [genac.trace(student, rng, longer) for _ in range(400)]
    kinds = Counter(
        (len(re.findall(r"[+-]", prompt.partition("=")[0])), "<answer>" in text)
        for prompt, text in found
    )
    assert set(kinds) == {(6, True), (7, False), (8, False), (9, False)}
    assert 150 < kinds[6, True] < 250


def test_traces_are_rows_of_prompt_and_completion(genac, student, tmp_path):
    genac.write_traces(tmp_path / "traces.jsonl", [student], random.Random(0), 7, None)
    rows = [json.loads(x) for x in (tmp_path / "traces.jsonl").read_text().splitlines()]
    assert len(rows) == 7
    assert all(set(row) == {"prompt", "completion"} for row in rows)
