"""A tiny sequence-classification model as a reward function."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from llmac.errors import ConfigError, RewardError
from llmac.rewards.contracts import RewardSpec
from llmac.rewards.reward_model import RewardModel

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def tiny_config(**changes):
    settings = {
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_labels": 1,
        "pad_token_id": 0,
        "initializer_range": 0.5,
    }
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny_config())


def by_hand(model, tokenizer, text):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, 0].item()


def test_the_reward_is_the_score_of_prompt_and_response(model, tokenizer):
    judge = RewardModel(model, tokenizer)
    prompts, completions = ["1+1=", "Tell me a story: "], ["2", "Once upon a time"]
    expected = [by_hand(model, tokenizer, p + c) for p, c in zip(prompts, completions, strict=True)]
    assert judge(prompts, completions) == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_batch_size_and_order_do_not_matter(model, tokenizer):
    prompts = ["a", "bb", "ccc", "d" * 20, "ee"]
    completions = ["x"] * 5
    whole = RewardModel(model, tokenizer, batch_rows=5)(prompts, completions)
    assert RewardModel(model, tokenizer, batch_rows=2)(prompts, completions) == pytest.approx(
        whole, abs=1e-5
    )
    turned = RewardModel(model, tokenizer)(prompts[::-1], completions)
    assert turned[::-1] == pytest.approx(whole, abs=1e-5)


def test_chat_messages_go_through_the_reward_models_template(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    judge = RewardModel(model, tokenizer)
    (reward,) = judge(
        [[{"role": "user", "content": "hi"}]], [[{"role": "assistant", "content": "yes"}]]
    )
    assert reward == pytest.approx(by_hand(model, tokenizer, "[user]hi[assistant]yes"), abs=1e-5)


def test_as_a_reward_function_beside_another(model, tokenizer, rewards, answered):
    judge = RewardModel(model, tokenizer, name="judge")
    score = rewards(RewardSpec(function=judge, weight=2.0), lambda prompt, response: 1.0)
    (scored,) = score([answered("2", prompt="1+1=", extra="column")])
    assert scored.reward_parts["judge"] == pytest.approx(
        by_hand(model, tokenizer, "1+1=2"), abs=1e-5
    )
    assert scored.reward == pytest.approx(2.0 * scored.reward_parts["judge"] + 1.0)


def test_messages_without_a_chat_template_are_an_error(model, tokenizer, rewards, answered):
    score = rewards(RewardModel(model, tokenizer))
    with pytest.raises(RewardError, match="no chat template"):
        score([answered("yes", prompt=[{"role": "user", "content": "hi"}])])


def test_a_text_longer_than_the_model_reads_is_an_error(model, tokenizer, rewards, answered):
    score = rewards(RewardModel(model, tokenizer))
    with pytest.raises(RewardError, match=r"70 tokens; .*reads 64.*for prompt q/1"):
        score([answered("b" * 35, prompt="a" * 35, id_="q/1")])


def test_a_saved_reward_model_is_loaded_by_its_path(model, tokenizer, tmp_path):
    folder = tmp_path / "my_judge"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    judge = RewardModel.from_pretrained(str(folder))
    assert judge.__name__ == "my_judge"
    assert judge(["1+1="], ["2"]) == pytest.approx([by_hand(model, tokenizer, "1+1=2")], abs=1e-5)


def test_a_language_model_is_not_taken_for_a_reward_model(tokenizer, tmp_path):
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"not a trained reward model.*score\.weight"):
        RewardModel.from_pretrained(str(tmp_path))


def test_a_classifier_with_several_outputs_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="2 outputs"):
        RewardModel(LlamaForSequenceClassification(tiny_config(num_labels=2)), tokenizer)


def test_nothing_at_the_path_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        RewardModel.from_pretrained(str(tmp_path / "nothing"))
