"""Joint text-vision pre-training: next-token prediction over text and pictures alike.

Source: Kimi K2.5 technical report (arXiv:2602.02276), Sec. 2.1 and 4.3, Table 3. The constant,
moderate vision share from the first step on is the data plan's; here a vision token is context like
any other, and only text is predicted.
"""

from jaxtyping import Float
from torch import Tensor

from moonlit.batch import PackedBatch
from moonlit.losses.language_modeling import next_token_loss
from moonlit.models.decoder import DecoderOutput
from moonlit.phases.base import PhaseModule


class JointPretraining(PhaseModule):
    """Trains encoder, projector and language model together.

    Trains: everything, or the named parts: ``[vision_tower, mm_projector]`` is the report's ViT
    stage (caption loss against a frozen language model), ``[mm_projector]`` its short alignment.
    Minimises: next-token cross-entropy per trained token of the global batch, plus the router's
    load-balance loss where the model weighs it.
    Source: arXiv:2602.02276, Sec. 4.3 (Table 3).
    """

    def loss(self, output: DecoderOutput, batch: PackedBatch) -> Float[Tensor, ""]:
        """Return the summed cross-entropy of the text tokens given all before them [nats]."""
        nll_sum = next_token_loss(
            output.hidden_TD, self.model.language_model.lm_head.weight,
            batch.target_ids, batch.loss_mask,
        )  # fmt: skip
        return nll_sum + output.load_balance_loss * batch.loss_mask.sum()
