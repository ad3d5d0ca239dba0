"""Weights from a trainer into an engine, and the proof that they arrived.

A sync that silently leaves old weights behind was the costliest fault of other stacks: log-probs
of engine and trainer differed by 0.2 for months. So every sync ends with a probe: a few rows whose
log-probs are computed by the trainer's forward and, token by token over the cache, by the engine.

Axes: T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

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
PROBE_PREFILL = 20
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
            prompts.append(Prompt(row[:length], media, shape.media_pad_id))
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
    pairs = zip(engine_logprobs(runner, probe.prompts), trained, strict=True)
    gaps = torch.cat([ours - theirs.to(runner.device) for ours, theirs in pairs])
    return float(gaps.abs().nan_to_num(nan=torch.inf).max())


@torch.inference_mode()
def engine_logprobs(runner: Runner, prompts: Sequence[Prompt]) -> list[Float[Tensor, " T_minus_1"]]:
    """Log-prob of each token behind the first of each row: a prefill, then steps of one token."""
    sequences = [CachedSequence() for _ in prompts]
    longest = max(len(prompt.ids) for prompt in prompts)
    cuts = [0, *range(min(PROBE_PREFILL, longest - 1), longest)]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    features = runner.features([(prompt, 0) for prompt in prompts])
    try:
        for start, end in pairwise(cuts):
            fed = [row for row, prompt in enumerate(prompts) if start < len(prompt.ids) - 1]
            new_ids = [prompts[row].ids[start:end] for row in fed]
            scores_TV = runner.all_logits([sequences[row] for row in fed], new_ids, features)
            for row, part in zip(fed, scores_TV.split(list(map(len, new_ids))), strict=True):
                logits[row].append(part)
            features = None  # the prefill took them
    finally:
        for sequence in sequences:
            runner.cache.release(sequence)
    return [
        logprobs_of(torch.cat(parts)[: len(prompt.ids) - 1], prompt.ids[1:])
        for parts, prompt in zip(logits, prompts, strict=True)
    ]


@torch.no_grad()
def trainer_logprobs(
    module: nn.Module, prompts: Sequence[Prompt]
) -> list[Float[Tensor, " T_minus_1"]]:
    """Log-prob of each token behind the first of each row, by the forward that training runs.

    Every rank of a sharded module must ask.
    """
    if not isinstance(module, Kimi):
        raise TypeError(f"update_weights wants a Kimi, got {type(module).__name__}")
    device = next(module.parameters()).device
    lengths = [len(prompt.ids) for prompt in prompts]
    ids = torch.tensor([token for prompt in prompts for token in prompt.ids], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    with evaluation_mode(module):
        media = [prompt.media for prompt in prompts if prompt.media is not None]
        features = None
        if media:
            features = module.encode_media(
                PackedMedia(
                    pixel_values=torch.cat([one.pixel_values for one in media]).to(device),
                    grid_thw=torch.cat([one.grid_thw for one in media]).to(device),
                )
            )
        bounds = torch.tensor([0, *accumulate(lengths)])
        output = module(ids, positions, bounds, features)
        rows = module.logits(output.hidden_TD).split(lengths)
    return [
        logprobs_of(logits[:-1], prompt.ids[1:])
        for logits, prompt in zip(rows, prompts, strict=True)
    ]


def logprobs_of(logits: Float[Tensor, "T V"], ids: Sequence[int]) -> Float[Tensor, " T"]:
    """Log-prob of one id a row, in fp32."""
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    return logits.float().log_softmax(dim=-1).gather(-1, chosen)[:, 0]
