"""The model and its latent cache: sequences take in tokens, scores of the next ones come out.

Axes: B sequences, T tokens, M vision tokens, D model width, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from moonlit.batch import PackedMedia
from moonlit.models.cache import CachedSequence, LatentCache
from moonlit.models.kimi import Kimi
from moonlit.models.mixed_precision import autocast_of, lower_products
from moonlit.rl.engines.prompt import Prompt


class Runner:
    """A model in evaluation mode with a cache of its own.

    Args:
        model: is put into evaluation mode.
        max_cache_tokens: room of the cache; None: as much as is asked for.
        precision: the trainer's, by Lightning's name.
    """

    def __init__(
        self, model: Kimi, *, max_cache_tokens: int | None, precision: str = "32-true"
    ) -> None:
        lower_products(model, precision)
        self.precision = precision
        weight = model.language_model.lm_head.weight
        self.model, self.device = model.eval(), weight.device
        self.cache = LatentCache(
            model.decoder_shape, max_tokens=max_cache_tokens, dtype=weight.dtype, device=self.device
        )

    def next_logits(
        self,
        sequences: Sequence[CachedSequence],
        new_ids: Sequence[Sequence[int]],
        features: Float[Tensor, "M D"] | None = None,
    ) -> Float[Tensor, "B V"]:
        """Feed sequences their new tokens; return the scores behind the last of each."""
        hidden_TD, ends = self._hidden(sequences, new_ids, features)
        if len(hidden_TD) > len(sequences):
            hidden_TD = hidden_TD[torch.tensor(ends[1:], device=self.device) - 1]
        with self.autocast():
            return self.model.logits(hidden_TD)

    def all_logits(
        self,
        sequences: Sequence[CachedSequence],
        new_ids: Sequence[Sequence[int]],
        features: Float[Tensor, "M D"] | None = None,
    ) -> Float[Tensor, "T V"]:
        """Feed sequences their new tokens; return the scores behind every one."""
        hidden_TD, _ = self._hidden(sequences, new_ids, features)
        with self.autocast():
            return self.model.logits(hidden_TD)

    def autocast(self) -> AbstractContextManager[object]:
        """Return what the trainer's forward runs under."""
        return autocast_of(self.precision, self.device)

    def features(self, prompts: Sequence[tuple[Prompt, int]]) -> Float[Tensor, "M D"] | None:
        """Encode what is needed of prompts from a token each on, in one call."""
        needed = [prompt.media_from(first) for prompt, first in prompts]
        some = [(media, skipped) for media, skipped in needed if media is not None]
        if not some:
            return None
        together = PackedMedia(
            pixel_values=torch.cat([media.pixel_values for media, _ in some]).to(self.device),
            grid_thw=torch.cat([media.grid_thw for media, _ in some]).to(self.device),
        )
        with self.autocast():
            features = self.model.encode_media(together)
        rows = features.split([media.num_tokens for media, _ in some])
        return torch.cat([row[skipped:] for row, (_, skipped) in zip(rows, some, strict=True)])

    def _hidden(
        self,
        sequences: Sequence[CachedSequence],
        new_ids: Sequence[Sequence[int]],
        features: Float[Tensor, "M D"] | None,
    ) -> tuple[Float[Tensor, "T D"], list[int]]:
        ends: list[int] = [0]
        positions: list[int] = []
        row: list[int] = []
        for sequence, ids in zip(sequences, new_ids, strict=True):
            row += ids
            positions += range(sequence.length, sequence.length + len(ids))
            ends.append(len(row))
        self.cache.select(sequences)
        with self.autocast():
            output = self.model(
                torch.tensor(row, device=self.device),
                torch.tensor(positions, device=self.device),
                torch.tensor(ends),
                features,
                self.cache,
            )
        return output.hidden_TD, ends
