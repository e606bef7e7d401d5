"""Functions in the style of TRL's GRPOTrainer documentation run unchanged."""

import asyncio
import re


def format_reward(completions, **kwargs):
    """Names nothing but the completions, which are chat messages."""
    contents = [completion[0]["content"] for completion in completions]
    return [
        1.0 if re.match(r"^<think>.*?</think><answer>.*?</answer>$", c) else 0.0 for c in contents
    ]


def accuracy_reward(completions, ground_truth, **kwargs):
    """A dataset column by name."""
    boxed = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in boxed]
    return [1.0 if c == truth else 0.0 for c, truth in zip(contents, ground_truth, strict=True)]


async def async_reward(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(c)) for c in completions]


def math_only_reward(prompts, completions, task, **kwargs):
    """Applies to one kind of row."""
    return [
        float(completion.strip() == "2") if kind == "math" else None
        for completion, kind in zip(completions, task, strict=True)
    ]


def length_in_tokens_reward(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def curriculum_reward(completions, trainer_state, log_metric, log_extra, **kwargs):
    log_metric("words", sum(len(c.split()) for c in completions) / len(completions))
    log_extra("words", [len(c.split()) for c in completions])
    return [float(trainer_state.global_step)] * len(completions)


def names_few_columns(completions, answer):
    """No **kwargs: gets what it names and nothing else."""
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def test_accuracy_with_a_dataset_column(rewards, answered):
    score = rewards(accuracy_reward)
    scored = score(
        [
            answered(r"It is \boxed{2}", ground_truth="2", other=1),
            answered(r"\boxed{3}", ground_truth="2", other=1),
        ]
    )
    assert [t.reward for t in scored] == [1.0, 0.0]
    assert scored[0].reward_parts == {"accuracy_reward": 1.0}
    assert scored[0].response_text == r"It is \boxed{2}"  # without <eos>


def test_chat_prompts_come_with_chat_completions(rewards, answered):
    chat = [{"role": "user", "content": "hello"}]
    score = rewards(format_reward)
    scored = score([answered("<think>a</think><answer>b</answer>", chat), answered("b", chat)])
    assert [t.reward for t in scored] == [1.0, 0.0]


def test_an_async_function(rewards, answered):
    assert [t.reward for t in rewards(async_reward)([answered("ab"), answered("abc")])] == [
        2.0,
        3.0,
    ]


def test_none_does_not_apply_and_the_others_decide(rewards, answered):
    score = rewards(math_only_reward, async_reward)
    scored = score([answered("2", task="math"), answered("code", task="code")])
    assert [t.reward for t in scored] == [1.0 + 1.0, 4.0]
    assert scored[1].reward_parts == {"math_only_reward": None, "async_reward": 4.0}
    metrics = score.metrics()
    assert metrics["reward/math_only_reward/none"].value == 1
    assert metrics["reward/math_only_reward/mean"].value == 1.0  # over those it applies to


def test_completion_ids_trainer_state_and_logging_are_there(rewards, answered):
    score = rewards(length_in_tokens_reward, curriculum_reward)
    score.step = 7
    scored = score([answered("a b"), answered("a b c d")])
    assert [t.reward for t in scored] == [4 + 7, 8 + 7]  # with <eos>
    assert score.metrics()["reward/curriculum_reward/logged/words"].value == 3.0
    assert score([answered("a")])[0].reward_parts["curriculum_reward"] == 8.0


def test_a_function_without_kwargs_gets_only_the_columns_it_names(rewards, answered):
    scored = rewards(names_few_columns)([answered("is 2", answer="2", question="?", level=3)])
    assert scored[0].reward == 1.0
