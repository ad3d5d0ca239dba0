"""A checkpoint to be talked to: what ``chat``, ``eval`` and ``rejection_sampling`` begin with."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from moonlit.agents.sandbox.pool import Pool
from moonlit.chat.tokenizer import Tokenizer
from moonlit.chat.vision_processing import PatchLimits
from moonlit.distributed.checkpoint import account_of, model_from_checkpoint
from moonlit.rl.conversation import Conversation
from moonlit.rl.engines.native import NativeEngine


def conversation_of(settings: Mapping[str, Any]) -> Conversation:
    """Load a command's checkpoint into a native engine.

    Args:
        settings: the command's values, as in ``conf/chat.yaml``.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is none, or was trained with another vocabulary.
    """
    require_vocabulary(settings)
    tokenizer = Tokenizer.named(settings["tokenizer"])
    model = model_from_checkpoint(Path(settings["ckpt"]))
    engine = NativeEngine(
        model.to(torch.device(settings["device"])),
        max_sequences=settings["max_sequences"],
        max_cache_tokens=settings["max_cache_tokens"],
    )
    return Conversation(
        engine=engine,
        tokenizer=tokenizer,
        max_positions=engine.shape.max_positions,
        max_new_tokens=settings["max_new_tokens"],
        thinking=settings["thinking"],
        temperature=settings["temperature"],
        top_p=settings["top_p"],
        max_turns=settings["max_turns"],
        limits=PatchLimits(per_image=settings["max_image_patches"]),
    )


def require_vocabulary(settings: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that a checkpoint was not trained with, before its weights are read.

    Args:
        settings: ``ckpt`` and ``tokenizer``.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: naming both.
    """
    account, tokenizer = account_of(settings["ckpt"]), Tokenizer.named(settings["tokenizer"])
    shape, special = account["shapes"]["decoder"], tokenizer.special
    if (shape["vocab_size"], shape["media_pad_id"]) != (tokenizer.vocab_size, special.media_pad_id):
        raise ValueError(
            f"ckpt={settings['ckpt']} has {shape['vocab_size']} token ids, its media placeholder at"
            f" {shape['media_pad_id']}; tokenizer={settings['tokenizer']} has"
            f" {tokenizer.vocab_size}, at {special.media_pad_id}: name the one that the model was"
            " trained with"
        )
    if account.get("made_by", {}).get("tokenizer", tokenizer.digest) != tokenizer.digest:
        raise ValueError(
            f"ckpt={settings['ckpt']} was trained with other words than those of tokenizer="
            f"{settings['tokenizer']}, though as many: name the one that it was trained with"
        )


@asynccontextmanager
async def sandboxes(tools: str | None) -> AsyncIterator[Pool | None]:
    """Lend sandboxes where tools are asked for.

    Raises:
        ValueError: if the tools are none of ours.
    """
    if tools is None:
        yield None
    elif tools == "ipython":
        async with Pool() as pool:
            yield pool
    else:
        raise ValueError(f"tools={tools}: want null or ipython")
