"""A model of a few thousand weights tells tones apart: sounds are read, not only stored."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from files import LIMIT, prepared, tar
from micro_run import micro_model
from test_media import tone

from data_modules.components.corpus import Corpus
from data_modules.components.packing import RowBuilder
from data_modules.sources.web_dataset import WebDataset
from moonlit.batch import PackedBatch
from moonlit.chat.tokenizer import Tokenizer
from moonlit.models.kimi import Kimi

TOKENIZER = Tokenizer.embedded()
LETTERS = {300.0: "a", 2800.0: "b"}


def model() -> Kimi:
    micro = micro_model()
    torch.manual_seed(0)
    decoder = replace(
        micro.decoder_shape, vocab_size=2304, media_pad_id=TOKENIZER.special.media_pad_id
    )
    return Kimi(decoder=decoder, vision=micro.vision_shape)


def row_of(corpus: Corpus, texts: list[int], sounds: list[int]) -> PackedBatch:
    """Documents with their own sounds, or with those of others."""
    builder = RowBuilder()
    for text, sound in zip(texts, sounds, strict=True):
        document = corpus.read("tones", text)
        items = corpus.read("tones", sound).patches("tones")
        builder.add(document, 0, len(document.input_ids), items)
    return builder.finish(0)


def loss_of(network: Kimi, row: PackedBatch) -> torch.Tensor:
    """Of the letters alone: each is the last token of its document but one."""
    assert row.media is not None
    features = network.encode_media(row.media)
    output = network(row.input_ids, row.position_ids, row.cu_seqlens, features)
    logits = network.language_model.lm_head(output.hidden_TD)
    before = row.cu_seqlens[1:].long() - 3
    return torch.nn.functional.cross_entropy(logits[before], row.target_ids[before])


@pytest.mark.slow
def test_sounds_are_told_apart(tmp_path: Path):
    members = {}
    for n in range(24):
        frequency = list(LETTERS)[n % 2] * (1 + 0.01 * (n // 2))
        members |= {
            f"{n:02d}.wav": tone(frequency, 0.5),
            f"{n:02d}.txt": list(LETTERS.values())[n % 2].encode(),
        }
    tar(tmp_path / "a.tar", members)
    reader = WebDataset(files=str(tmp_path / "a.tar"), columns=None, **LIMIT)
    prepared(tmp_path / "out", reader, sound=True)
    corpus = Corpus({"tones": str(tmp_path / "out")})
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)

    for step in range(100):
        chosen = [(5 * step + k) % 20 for k in range(8)]
        optimizer.zero_grad()
        loss_of(network, row_of(corpus, chosen, chosen)).backward()
        optimizer.step()

    held_out = [20, 21, 22, 23]
    with torch.no_grad():
        seen = loss_of(network, row_of(corpus, held_out, held_out))
        swapped = loss_of(network, row_of(corpus, held_out, [21, 20, 23, 22]))
    assert seen < 0.3 < 1.5 < swapped  # chance is 0.69
