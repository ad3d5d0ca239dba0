"""Weights from a trainer into an engine, and the proof that they arrived.

A sync that silently leaves old weights behind was the costliest fault of other stacks: log-probs
of engine and trainer differed by 0.2 for months. So every sync ends with a probe: a few rows whose
log-probs are computed by the trainer's forward and, token by token over the cache, by the engine.

Axes: T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moonlit.batch import PackedMedia
from moonlit.hub.mismatch import require_fit
from moonlit.models.cache import CachedSequence
from moonlit.models.decoding import evaluation_mode
from moonlit.models.kimi import Kimi
from moonlit.rl.engines.prompt import Prompt
from moonlit.rl.engines.runner import Runner

PROBE_TOKENS = 24
PROBE_PREFILL = 16
"""So many tokens of a probe row come as a prompt, the others one by one."""
PROBE_GRID = (1, 4, 4)


class WeightSyncError(RuntimeError):
    """Engine and trainer do not compute the same policy."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Fixed rows, with an image where the model can see."""

    prompts: list[Prompt]

    @classmethod
    def for_model(cls, model: Kimi) -> "Probe":
        """Draw the rows; the same for every model of a shape."""
        shape = model.decoder_shape
        generator = torch.Generator().manual_seed(0)
        length = min(PROBE_TOKENS, shape.max_positions)
        ids = torch.randint(shape.media_pad_id, (3, length), generator=generator).tolist()
        prompts = [Prompt(row, None, shape.media_pad_id) for row in ids[:2]]
        if model.vision_shape is not None:
            t, h, w = PROBE_GRID
            pixels = torch.randint(0, 256, (t * h * w, 3, 14, 14), generator=generator)
            media = PackedMedia(
                pixel_values=pixels.to(torch.uint8), grid_thw=torch.tensor([PROBE_GRID])
            )
            row = [ids[2][0], *[shape.media_pad_id] * media.num_tokens, *ids[2][1:]]
            prompts.append(Prompt(row[: shape.max_positions], media, shape.media_pad_id))
        return cls(prompts)


def copy_weights(weights: Mapping[str, Tensor], target: nn.Module) -> None:
    """Overwrite a network's weights with another's by name, cast to its dtype.

    Sharded tensors are gathered one at a time, so every rank of the mesh must call this.

    Raises:
        ValueError: if a tensor is missing, unexpected or misshapen; names them all.
    """
    own = target.state_dict()
    require_fit(
        {name: tensor.shape for name, tensor in weights.items()},
        {name: tensor.shape for name, tensor in own.items()},
        source="the trainer's module",
    )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(whole(weights[name]))


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; every rank of its mesh must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def logprob_gap(runner: Runner, trained: Sequence[Tensor], probe: Probe) -> float:
    """Return the largest difference of the probe's log-probs between engine and trainer [nats].

    Args:
        runner: the engine's.
        trained: the trainer's log-probs, a row each.
        probe: the rows.
    """
    gaps = [
        (engine_logprobs(runner, prompt) - theirs.to(runner.device))
        .abs()
        .nan_to_num(nan=torch.inf)
        .max()
        for prompt, theirs in zip(probe.prompts, trained, strict=True)
    ]
    return float(torch.stack(gaps).max())


@torch.no_grad()
def probe_logprobs(module: nn.Module, probe: Probe) -> list[Tensor]:
    """Return the trainer's log-probs of the probe, a row each; every rank must ask."""
    return [trainer_logprobs(module, prompt) for prompt in probe.prompts]


@torch.inference_mode()
def engine_logprobs(runner: Runner, prompt: Prompt) -> Float[Tensor, " T_minus_1"]:
    """Log-prob of each token behind the first: a prefill, then steps of one token."""
    sequence = CachedSequence()
    features = runner.features([(prompt, 0)])
    cuts = [prompt.ids[:PROBE_PREFILL], *([token] for token in prompt.ids[PROBE_PREFILL:-1])]
    try:
        logits = [
            runner.all_logits([sequence], [ids], features if place == 0 else None)
            for place, ids in enumerate(cuts)
        ]
    finally:
        runner.cache.release(sequence)
    return logprobs_of(torch.cat(logits), prompt.ids[1:])


def trainer_logprobs(module: nn.Module, prompt: Prompt) -> Float[Tensor, " T_minus_1"]:
    """Log-prob of each token behind the first, by the forward that training runs."""
    if not isinstance(module, Kimi):
        raise TypeError(f"update_weights wants a Kimi, got {type(module).__name__}")
    device = next(module.parameters()).device
    ids = torch.tensor(prompt.ids, device=device)
    with evaluation_mode(module):
        media = prompt.media
        features = None
        if media is not None:
            features = module.encode_media(
                PackedMedia(
                    pixel_values=media.pixel_values.to(device), grid_thw=media.grid_thw.to(device)
                )
            )
        bounds = torch.tensor([0, len(ids)], device=device)
        output = module(ids, torch.arange(len(ids), device=device), bounds, features)
        logits = module.logits(output.hidden_TD[:-1])
    return logprobs_of(logits, prompt.ids[1:])


def logprobs_of(logits: Float[Tensor, "T V"], ids: Sequence[int]) -> Float[Tensor, " T"]:
    """Log-prob of one id a row, in fp32."""
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    return logits.float().log_softmax(dim=-1).gather(-1, chosen)[:, 0]
