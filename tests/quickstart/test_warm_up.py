"""The quickstart's policy: its tokenizer is lossless, it learns, and what is written can be trained on."""

import json
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import RECIPE


def test_tokens_are_characters_and_come_back(quickstart, tmp_path):
    quickstart.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "4+8-6=4+8=12;12-6=6"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer("<eos>")["input_ids"] == [tokenizer.eos_token_id] == [quickstart.END]
    assert tokenizer.pad_token_id == quickstart.PAD


def test_no_solution_is_longer_than_the_context(quickstart):
    rng = random.Random(0)
    longest = 0
    for _ in range(3000):
        problem = quickstart.random_sum(rng)
        solution = problem.worked(rng, bug_rate=quickstart.SIX_STEPS.bug_rate)
        longest = max(longest, len(problem.prompt + solution) + 1)
    assert 56 <= longest <= quickstart.SIX_STEPS.context_tokens


def test_only_the_solution_and_its_end_are_learnt(quickstart):
    tokenizer = quickstart.make_tokenizer()
    ids, labels = quickstart.lesson(tokenizer, random.Random(0), 8)
    for row, target in zip(ids, labels, strict=True):
        prompt_tokens = tokenizer.decode(row).index("=") + 1
        assert (target[:prompt_tokens] == -100).all()
        learnt = target[target != -100]
        assert learnt[-1] == tokenizer.eos_token_id
        assert (learnt == row[prompt_tokens : prompt_tokens + len(learnt)]).all()
        assert (row[prompt_tokens + len(learnt) :] == tokenizer.pad_token_id).all()


def test_the_policy_has_the_size_that_was_measured(quickstart):
    model = quickstart.make_model()
    assert model.num_parameters() == 149_312
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_warm_up_lowers_the_loss_and_follows_the_seed(quickstart):
    tokenizer = quickstart.make_tokenizer()

    def trained(seed):
        torch.manual_seed(0)
        model = quickstart.make_model()
        rng = random.Random(seed)
        loss = quickstart.warm_up(model, tokenizer, rng, steps=30, rows=8)
        return model, loss

    before = torch.log(torch.tensor(len(tokenizer))).item()  # nats of a uniform guess
    model, loss = trained(0)
    again, same_loss = trained(0)
    _, other_loss = trained(1)
    assert loss < 0.85 * before
    assert same_loss == loss
    assert other_loss != loss
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_script_writes_a_policy_and_disjoint_prompts(tmp_path):
    subprocess.run(
        [sys.executable, RECIPE, tmp_path, "--seed", "3", "--steps", "2"],
        check=True,
        capture_output=True,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert (
        model.config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token_id
    )
    train, held_out = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    assert set(train[0]) == {"prompt", "answer"}
    assert len(held_out) == 256
    assert len(train) >= 32 * 80
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert all(str(eval(row["prompt"].rstrip("="))) == row["answer"] for row in held_out)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_copy_is_as_good_as_the_student(quickstart):
    tokenizer = quickstart.make_tokenizer()
    torch.manual_seed(0)
    rng = random.Random(0)
    model = quickstart.make_model()
    quickstart.warm_up(model, tokenizer, rng, steps=quickstart.WARM_UP_STEPS)
    sums = [quickstart.random_sum(rng) for _ in range(512)]
    ids = tokenizer([s.prompt for s in sums], return_tensors="pt")["input_ids"]
    sampled = model.generate(ids, max_new_tokens=50, do_sample=True, temperature=1.0, top_k=0)
    texts = tokenizer.batch_decode(sampled[:, ids.shape[1] :], skip_special_tokens=True)
    right = [text.rpartition("=")[2] == str(s.answer) for text, s in zip(texts, sums, strict=True)]
    assert 0.18 < sum(right) / len(right) < 0.34
