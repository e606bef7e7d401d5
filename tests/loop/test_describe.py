"""What the loop says of a step's responses, also of steps in which none ended."""

from llmac.core.collate import collate
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory
from llmac.loop import describe


def rollouts_of(*rows):
    """Each row: tokens, finish, tokens trained on before."""
    batch = collate(
        [
            Trajectory(
                prompt=Prompt(id="p", token_ids=(1,), source="?"),
                response_ids=(5,) * tokens,
                action_mask=(True,) * tokens,
                sampler_logprobs=(0.0,) * tokens,
                finish=finish,
                group=0,
                reward=None if finish is Finish.PAUSED else 1.0,
                fresh_from=before,
            )
            for tokens, finish, before in rows
        ],
        length_limit=8,
    )
    return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)


def numbers(*rows):
    return {name: measure.value for name, measure in describe(rollouts_of(*rows)).items()}


def test_lengths_are_of_responses_that_ended_and_tokens_of_this_step():
    said = numbers((4, Finish.STOP, 3), (8, Finish.LENGTH, 6), (7, Finish.PAUSED, 2))
    assert said == {
        "response_length/mean": 6.0,
        "response_length/max": 8.0,
        "response_length/clip_ratio": 0.5,
        "rollout/tokens": 1 + 2 + 5,
        "rollout/sampled_tokens": 1 + 2 + 5,
    }


def test_where_nothing_ended_there_are_no_lengths():
    assert numbers((4, Finish.PAUSED, 1)) == {
        "rollout/tokens": 3.0,
        "rollout/sampled_tokens": 3.0,
    }
