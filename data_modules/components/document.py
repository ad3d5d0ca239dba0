"""One document on its way to disk: token ids with expanded placeholders, mask, media files.

Media stay in their native format (PNG, JPEG, WebP, GIF, MP4, WAV, ...): small on disk, decoded
where they are packed. A record is what LitData stores for a document; its CRC-32 stands in the
index, so that damage is noticed even where it would decode.
"""

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from data_modules.components.media import parts_of_file
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import MediaFile, Message, Text, VideoChunk
from moonlit.chat.template import Rendered, Writer, render
from moonlit.chat.tokenizer import Tokenizer
from moonlit.chat.vision_processing import (
    RELEASED_LIMITS,
    MediaItem,
    chunk_patches,
    image_patches,
    open_image,
)

INDEX_DTYPE = np.dtype(
    [("num_tokens", "<u4"), ("num_vision_tokens", "<u4"), ("num_patches", "<u4"), ("crc32", "<u4")]
)
"""What the index holds of each document; ``num_tokens`` counts vision tokens too."""

KINDS = ("picture", "video", "sound", "audiovisual")
FIELDS = ("input_ids", "loss_mask", "frames_per_item", "kinds", "bytes_per_frame", "frames")

Record = dict[str, Any]
Medium = Sequence[bytes] | MediaFile
"""The picture files of one visual item; or a video or a sound, which holds several items."""


@dataclass(slots=True, kw_only=True)
class Document:
    """Ids and media, ready to be packed."""

    input_ids: np.ndarray
    """uint32 [tokens]; one ``<|media_pad|>`` for each vision token."""
    loss_mask: np.ndarray
    """bool [tokens]: True where the token is trained *as a target*."""
    media: Sequence[Medium] = field(default_factory=list)
    """In the order of their placeholders."""
    num_vision_tokens: int = 0
    num_patches: int = 0

    def cut(self, num_tokens: int) -> None:
        """Drop what lies behind the first ``num_tokens``.

        Raises:
            ValueError: if media stand there: their files would have no placeholders left.
        """
        if self.media and len(self.input_ids) > num_tokens:
            raise ValueError(f"a document with media and over {num_tokens} tokens cannot be cut")
        self.input_ids = self.input_ids[:num_tokens]
        self.loss_mask = self.loss_mask[:num_tokens]

    def record(self) -> Record:
        """Lay the document out for LitData."""
        kinds = [m.kind if isinstance(m, MediaFile) else "picture" for m in self.media]
        groups = [[m.data] if isinstance(m, MediaFile) else m for m in self.media]
        files = [file for group in groups for file in group]
        return {
            "input_ids": self.input_ids.astype("<u4"),
            "loss_mask": np.packbits(self.loss_mask),
            "frames_per_item": np.array([len(group) for group in groups], "<u4"),
            "kinds": np.array([KINDS.index(kind) for kind in kinds], np.uint8),
            "bytes_per_frame": np.array([len(file) for file in files], "<u4"),
            "frames": b"".join(files),
        }

    def index_row(self, record: Record) -> tuple[int, int, int, int]:
        """Return the row of the index, in the order of ``INDEX_DTYPE``, of its ``record``."""
        crc32 = record_crc32(record)
        return len(self.input_ids), self.num_vision_tokens, self.num_patches, crc32

    @classmethod
    def from_record(cls, record: Record, row: np.void) -> "Document":
        """Read a record back.

        Args:
            record: as LitData returns it.
            row: the document's row of the index.

        Raises:
            ValueError: if the record is not the one that was written.
        """
        if (got := record_crc32(record)) != row["crc32"]:
            raise ValueError(f"CRC-32 is {got:08x}, the index says {row['crc32']:08x}")
        ends = np.cumsum(record["bytes_per_frame"]).tolist()
        files = (bytes(record["frames"][a:b]) for a, b in pairwise([0, *ends]))
        num_tokens = len(record["input_ids"])
        groups = [[next(files) for _ in range(num)] for num in record["frames_per_item"]]
        kinds = [KINDS[kind] for kind in record["kinds"]]
        return cls(
            input_ids=record["input_ids"],
            loss_mask=np.unpackbits(record["loss_mask"], count=num_tokens).astype(bool),
            media=[
                group if kind == "picture" else MediaFile(group[0], kind)
                for group, kind in zip(groups, kinds, strict=True)
            ],
            num_vision_tokens=int(row["num_vision_tokens"]),
            num_patches=int(row["num_patches"]),
        )

    def patches(self, name: str) -> list[MediaItem]:
        """Decode the media into patches.

        Args:
            name: of the document, for errors.

        Raises:
            ValueError: if a file cannot be decoded, or costs other than the index says.
        """
        items = [
            item
            for place, medium in enumerate(self.media)
            for item in items_of(medium, f"{name}, medium {place}")
        ]
        num_patches = sum(len(item.pixel_values) for item in items)
        if num_patches != self.num_patches:
            raise ValueError(f"{name}: {num_patches} patches, the index says {self.num_patches}")
        return items


def items_of(medium: Medium, name: str) -> list[MediaItem]:
    """Decode one medium into its visual items."""
    if isinstance(medium, MediaFile):
        parts = parts_of_file(medium, name)
        return [
            chunk_patches(part) if isinstance(part, VideoChunk) else image_patches(part.image)
            for part in parts
            if not isinstance(part, Text)
        ]
    frames = [open_image(file, name) for file in medium]
    return [
        image_patches(frames[0]) if len(frames) == 1 else chunk_patches(VideoChunk(frames, 0.0))
    ]


def record_crc32(record: Record) -> int:
    """Checksum of every field, in a fixed order."""
    crc32 = 0
    for key in FIELDS:
        crc32 = zlib.crc32(bytes(record[key]), crc32)
    return crc32


def text_document(text: str, tokenizer: Tokenizer) -> Document:
    """Return ``[BOS] text [EOS]`` (our default: no report states the frame of a document)."""
    special = tokenizer.special
    ids = np.array([special.bos_id, *tokenizer.encode(text), special.eos_id], np.uint32)
    return Document(input_ids=ids, loss_mask=np.ones(len(ids), bool))


def interleaved_document(
    parts: Sequence[Text | ImagePart | VideoChunk], tokenizer: Tokenizer
) -> Document:
    """Return ``[BOS] parts [EOS]``: captions, and pages with their text."""
    writer = Writer(tokenizer, RELEASED_LIMITS)
    writer.ids(tokenizer.special.bos_id)
    for part in parts:
        writer.part(part)
    writer.ids(tokenizer.special.eos_id)
    written = writer.finish()
    is_text = [token_id != tokenizer.special.media_pad_id for token_id in written.input_ids]
    written.loss_mask = is_text
    return from_rendered(written, parts, tokenizer)


def dialogue_document(
    messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[dict[str, Any]] = ()
) -> Document:
    """Return a dialogue in the chat format, of which only the assistant's words are trained.

    Which question a picture is asked cannot be told from the picture: training on questions too
    left counting at chance after 100 steps of 64 pictures, where answers alone reached 63 %.
    """
    parts = [part for message in messages for part in message.parts]
    return from_rendered(render(messages, tokenizer, tools=tools), parts, tokenizer)


def from_rendered(rendered: Rendered, parts: Sequence[Any], tokenizer: Tokenizer) -> Document:
    """Join rendered ids with the media files they stand for."""
    ids = np.array(rendered.input_ids, np.uint32)
    is_vision = ids == tokenizer.special.media_pad_id
    return Document(
        input_ids=ids,
        loss_mask=np.array(rendered.loss_mask),
        media=media_of(parts),
        num_vision_tokens=int(is_vision.sum()),
        num_patches=sum(len(item.pixel_values) for item in rendered.media),
    )


def media_of(parts: Sequence[Any]) -> list[Medium]:
    """Return what is stored of the parts' media: native files where they came as such."""
    media: list[Medium] = []
    for part in parts:
        if isinstance(part, Text):
            continue
        if part.file is None:
            media.append(encoded(part))
        elif part.file.kind == "picture":
            media.append([part.file.data])
        elif not media or media[-1] is not part.file:
            media.append(part.file)
    return media


def encoded(part: ImagePart | VideoChunk) -> list[bytes]:
    """Encode the frames of a part losslessly."""
    frames = [part.image] if isinstance(part, ImagePart) else part.frames
    return [png(frame) for frame in frames]


def png(image: Image.Image) -> bytes:
    """Encode a picture as PNG, at the compression level that is quick to write."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
