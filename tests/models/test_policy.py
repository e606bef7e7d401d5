"""The trained module's log-probabilities are those of the Hugging Face model's own logits."""

import pytest
import torch

from llmac.config.schema import LoraConfig
from llmac.models.loading import add_lora, train_in_full_mode
from llmac.models.packing import pack
from llmac.models.policy import TokenPolicy

ARCHITECTURES = ["qwen2", "llama", "gemma2", "granite", "gpt2"]


def recomputed(model, trajectories, temperature):
    """log π of every sampled token, one row at a time, unpadded, from the model's own logits."""
    out = []
    for trajectory in trajectories:
        ids = torch.tensor([trajectory.prompt.token_ids + trajectory.response_ids])
        logits = model(ids).logits[0].double() / temperature
        start = len(trajectory.prompt.token_ids)
        out.append(
            [
                logits[start + t - 1].log_softmax(-1)[token].item() if acts else 0.0
                for t, (token, acts) in enumerate(
                    zip(trajectory.response_ids, trajectory.action_mask, strict=True)
                )
            ]
        )
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_ragged_rows_equal_the_models_own(
    make_model, ragged, architecture, temperature
):
    model = make_model(architecture)
    policy = TokenPolicy(model, temperature=temperature, chunk_mb=1e-4)
    with torch.no_grad():
        logprobs, entropy = policy(pack(ragged, pad_id=7))
        expected = recomputed(model, ragged, temperature)
    for row, wanted in enumerate(expected):
        assert logprobs[row, : len(wanted)].tolist() == pytest.approx(wanted, abs=2e-5)
        assert logprobs[row, len(wanted) :].abs().sum() == 0
    assert entropy[0, 0] > 0


@pytest.mark.parametrize(
    ("architecture", "chunked"), [("qwen2", True), ("gemma2", True), ("granite", False)]
)
def test_a_model_that_scales_its_logits_is_found_out(make_model, architecture, chunked, ragged):
    policy = TokenPolicy(make_model(architecture), temperature=1.0, chunk_mb=1.0)
    policy(pack(ragged, pad_id=0))
    assert policy._chunked is chunked


def test_padding_tokens_change_nothing(make_model, ragged):
    policy = TokenPolicy(make_model(), temperature=1.0, chunk_mb=1.0)
    with torch.no_grad():
        assert torch.equal(policy(pack(ragged, pad_id=0))[0], policy(pack(ragged, pad_id=28))[0])


def test_an_adapter_starts_as_no_change_and_learns_alone(make_model, ragged):
    plain = TokenPolicy(make_model(), temperature=1.0, chunk_mb=1.0)
    before = plain(pack(ragged, pad_id=0))[0].detach()
    policy = TokenPolicy(
        add_lora(plain.model, LoraConfig(r=2, alpha=4)), temperature=1.0, chunk_mb=1.0
    )
    after, _ = policy(pack(ragged, pad_id=0))
    torch.testing.assert_close(after.detach(), before)
    after.sum().backward()
    learning = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert learning
    assert all("lora_" in name for name in learning)


def test_gradient_checkpointing_gives_the_same_gradient(make_model, ragged):
    def gradient(checkpointing):
        model = make_model()
        train_in_full_mode(model, gradient_checkpointing=checkpointing)
        TokenPolicy(model, temperature=1.0, chunk_mb=1e-4)(pack(ragged, pad_id=0))[
            0
        ].sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_training_mode_has_no_dropout(make_model, ragged, architecture):
    model = make_model(architecture, dropout=0.3)
    train_in_full_mode(model, gradient_checkpointing=False)
    policy = TokenPolicy(model, temperature=1.0, chunk_mb=1.0)
    assert torch.equal(policy(pack(ragged, pad_id=0))[0], policy(pack(ragged, pad_id=0))[0])
