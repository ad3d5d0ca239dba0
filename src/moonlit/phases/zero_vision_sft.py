"""Zero-vision SFT: text alone teaches to work on pictures, with code.

Source: Kimi K2.5 technical report (arXiv:2602.02276), Sec. 2.2. Joint pre-training has aligned text
and vision already; the dialogues here hold no picture. Every operation on an image is IPython code
and its printed result, so that the policy learns to look by programs before visual RL begins.
"""

from jaxtyping import Float
from torch import Tensor

from moonlit.batch import PackedBatch
from moonlit.losses.language_modeling import next_token_loss
from moonlit.models.decoder import DecoderOutput
from moonlit.phases.base import PhaseModule


class ZeroVisionSFT(PhaseModule):
    """Trains the language model on what the assistant wrote.

    Trains: the language model; encoder and projector stay as they are (ours: a text-only step has
    no gradient for them, and replayed pictures shall not move them either).
    Minimises: next-token cross-entropy per token of the assistant in the global batch.
    Source: arXiv:2602.02276, Sec. 2.2; loss on answers only: Kimi-VL (arXiv:2504.07491), Sec. 2.3.
    """

    def loss(self, output: DecoderOutput, batch: PackedBatch) -> Float[Tensor, ""]:
        """Return the summed cross-entropy of the assistant's tokens [nats]."""
        nll_sum = next_token_loss(
            output.hidden_TD, self.model.language_model.lm_head.weight,
            batch.target_ids, batch.loss_mask,
        )  # fmt: skip
        return nll_sum + output.load_balance_loss * batch.loss_mask.sum()
