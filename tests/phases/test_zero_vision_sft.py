"""Zero-vision SFT: the language model learns, encoder and projector do not move."""

import pytest
import torch
from micro_run import NoiseSteps, fit, micro_model, micro_settings

from moonlit.phases.zero_vision_sft import ZeroVisionSFT


def text_only(rows):
    return [row for row in rows if row.media is None]


@pytest.mark.parametrize("change", [text_only, None], ids=["text only", "with replayed pictures"])
def test_only_the_language_model_moves(change):
    phase = ZeroVisionSFT(**micro_settings(trains=["language_model"]))
    phase.configure_model()
    before = {name: p.detach().clone() for name, p in phase.model.named_parameters()}

    fit(phase=phase, max_steps=3, change=change)

    for name, p in phase.model.named_parameters():
        is_language = name.startswith("language_model.")
        idle = ".experts." in name  # an expert that no token chose stays
        assert is_language == (not torch.equal(p, before[name])) or idle, name


def test_its_loss_is_that_of_the_trained_tokens_alone():
    """Catches: prompts or tool results in the loss."""
    phase = ZeroVisionSFT(**micro_settings(trains=["language_model"]))
    torch.manual_seed(0)
    phase.model = micro_model()
    row = NoiseSteps()[0][1]
    row.loss_mask = torch.arange(row.num_tokens) % 3 == 1
    output = phase.model(row.input_ids, row.position_ids, row.cu_seqlens, None)
    logits = phase.model.language_model.lm_head(output.hidden_TD).float()
    nll = -logits.log_softmax(-1).gather(-1, row.target_ids[:, None])[:, 0]

    loss = phase.loss(output, row)
    torch.testing.assert_close(loss, nll[row.loss_mask].sum(), rtol=1e-5, atol=1e-5)
