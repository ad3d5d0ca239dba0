"""One row of any source to documents: chat messages, interleaved parts, or a medium and its text.

A row is an object with one of

    {"messages": [...]}                                     a dialogue, see ``dialogue_files``
    {"parts": [{"text": ...}, {"image": ...}, {"video": ...}]}   an interleaved document
    {"image": ..., "text": ...}                             a medium, then its text
    {"text": ...}                                           a text

A medium is bytes, a ``data:`` URI, a path that the source resolves, or ``{"bytes", "path"}`` as
Hugging Face writes it. A special token's string inside a text stays ordinary characters.
"""

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_modules.components.dialogue_files import parse_dialogue
from data_modules.components.document import (
    Document,
    dialogue_document,
    interleaved_document,
    text_document,
)
from data_modules.components.media import parts_of_file
from data_modules.components.sound import has_sound
from moonlit.chat.messages import Image, MediaFile, MediaKind, Text, VideoChunk
from moonlit.chat.template import samples_per_user_turn
from moonlit.chat.tokenizer import Tokenizer

Part = Text | Image | VideoChunk
KINDS: dict[str, MediaKind] = {
    "image": "picture",
    "video": "video",
    "audio": "sound",
}
"""What a row calls a medium, and what it is."""
TEXT_KEYS = ("text", "caption")
READ_KEYS = {"id", "messages", "tools", "parts", *KINDS, *TEXT_KEYS}


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that is left out, and why."""

    reason: str
    """A few words that many have in common, such as ``broken image``."""
    name: str
    """Which one, with file and line where there are any."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """What a row is made into."""

    row_id: str | None
    documents: list[Document]
    unread: list[str]
    """Keys that mean nothing to us: a user should know, a misspelt ``image`` is lost with them."""


class SkippedError(ValueError):
    """Raised inside a row; the row is left out, no other."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its source has it."""

    name: str
    values: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
    """Columns; or what reads them, where reading may fail."""
    open_file: Callable[[str], bytes]
    """Reads a medium by the path that the row names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Turns rows into documents.

    Args:
        tokenizer: whose ids the documents hold.
        max_document_tokens: a document with media that has more is left out, for it is never cut;
            None: any length.
        sound: read sounds, as pictures of their spectra, and the sound of videos; False leaves out
            rows that have a sound, and reads videos without theirs.
    """

    tokenizer: Tokenizer
    max_document_tokens: int | None
    sound: bool = False

    def documents(self, row: Row) -> "Made":
        """Return what a row is made into.

        Raises:
            SkippedError: if it has to be left out.
        """
        values = row.values() if callable(row.values) else row.values
        made = list(self.made(values, row))
        for document in made:
            self.check_length(document)
        row_id = values.get("id")
        unread = [key for key in values if key not in READ_KEYS]
        return Made(None if row_id is None else str(row_id), made, unread)

    def made(self, values: Mapping[str, Any], row: Row) -> Iterator[Document]:
        """Yield the documents of a row's values."""
        if values.get("messages") is not None:
            yield from self.dialogue(values, row)
        elif values.get("parts") is not None:
            yield self.interleaved(values["parts"], row)
        else:
            text = next((values[k] for k in TEXT_KEYS if values.get(k) is not None), None)
            media = {key: values[key] for key in KINDS if values.get(key) is not None}
            if text is None:
                wanted = "messages, parts, or text (or caption)"
                raise SkippedError("missing key", f"has {sorted(values)}, want {wanted}")
            if media:
                yield self.interleaved([*({k: v} for k, v in media.items()), {"text": text}], row)
            else:
                yield text_document(some_text(text), self.tokenizer)

    def dialogue(self, values: Mapping[str, Any], row: Row) -> Iterator[Document]:
        """Yield a dialogue's samples, one for each user turn."""

        def media(kind: str, value: Any) -> Sequence[Any]:
            return self.media(kind, value, row)

        try:
            dialogue = parse_dialogue(values, media=media)
        except SkippedError:
            raise
        except KeyError as error:
            raise SkippedError("missing key", f"no key {error} in a message") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise SkippedError("no dialogue", str(error)) from error
        for messages in samples_per_user_turn(dialogue.messages):
            yield dialogue_document(messages, self.tokenizer, tools=dialogue.tools)

    def interleaved(self, values: Any, row: Row) -> Document:
        """Return the document of a list of parts."""
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise SkippedError("not a list of parts", f"parts are {type(values).__name__}")
        parts: list[Part] = []
        for place, value in enumerate(values):
            parts += self.part(value, place, row)
        if not any(isinstance(part, Text) and part.text.strip() for part in parts):
            raise SkippedError("no text", "there is nothing to predict")
        if all(isinstance(part, Text) for part in parts):
            text = "".join(part.text for part in parts if isinstance(part, Text))
            return text_document(text, self.tokenizer)
        return interleaved_document(parts, self.tokenizer)

    def part(self, value: Any, place: int, row: Row) -> Sequence[Part]:
        """Read one part: an object with one key that is set."""
        held = {k: v for k, v in dict(value).items() if v is not None} if is_object(value) else {}
        held.pop("type", None)
        if len(held) != 1 or not held.keys() <= {"text", *KINDS}:
            keys = sorted(held) if is_object(value) else type(value).__name__
            raise SkippedError("missing key", f"part {place} has {keys}: want one of text, image, "
                               "video, audio")  # fmt: skip
        ((kind, content),) = held.items()
        return [Text(checked_text(content))] if kind == "text" else self.media(kind, content, row)

    def media(self, kind: str, value: Any, row: Row) -> Sequence[Part]:
        """Read a medium."""
        if kind == "audio" and not self.sound:
            raise SkippedError("sound", "a row has audio; read it with source.sound=true")
        data = medium_bytes(value, row)
        if not data:
            raise SkippedError(f"empty {kind}", "no byte")
        read_as = KINDS[kind]
        if kind == "video" and self.sound and has_sound(data):
            read_as = "audiovisual"
        try:
            return parts_of_file(MediaFile(data, read_as), row.name)
        except ValueError as error:
            raise SkippedError(f"broken {kind}", str(error)) from error

    def check_length(self, document: Document) -> None:
        """Leave out what cannot be cut and is too long."""
        length, longest = len(document.input_ids), self.max_document_tokens
        whole = document.num_vision_tokens > 0
        if longest is not None and whole and length > longest:
            raise SkippedError("too many tokens", f"{length:,} tokens, want at most {longest:,}")


def is_object(value: Any) -> bool:
    """Whether a decoded value has keys."""
    return isinstance(value, Mapping)


def checked_text(value: Any) -> str:
    """Return a text.

    Raises:
        SkippedError: if it is none, or its bytes are not UTF-8.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SkippedError("text is not UTF-8", str(error)) from error
    if not isinstance(value, str):
        raise SkippedError("not a text", f"got {type(value).__name__}")
    return value


def some_text(value: Any) -> str:
    """Return a text that is more than blanks.

    Raises:
        SkippedError: if it is not.
    """
    if not (text := checked_text(value)).strip():
        raise SkippedError("no text", "there is nothing to predict")
    return text


def medium_bytes(value: Any, row: Row) -> bytes:
    """Return the encoded file of a medium."""
    if is_object(value):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str):
        raise SkippedError("missing medium", f"got {type(value).__name__}: want bytes or a path")
    if value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise SkippedError("data: URI is not base64", str(error)) from error
    if value.startswith(("http://", "https://")):
        raise SkippedError("URL", f"{value} is not fetched: want bytes, a path or a data: URI")
    return row.open_file(value)


def file_in(folder: Path, path: str, max_bytes: int) -> bytes:
    """Read a file below a folder.

    Raises:
        SkippedError: if the path leads out of it, there is no such file, or it is too large.
    """
    check_inside(path)
    full = folder / path
    if not full.resolve().is_relative_to(folder.resolve()):
        raise SkippedError("unsafe path", f"{path!r} leads out of {folder}")
    if not full.is_file():
        raise SkippedError("missing medium", f"no file {full}")
    if (size := full.stat().st_size) > max_bytes:
        raise SkippedError("too large", f"{path!r} has {size:,} bytes, want at most {max_bytes:,}")
    return full.read_bytes()


def check_inside(path: str) -> None:
    """Refuse a path that leaves the place it is relative to.

    Raises:
        SkippedError: if it does.
    """
    pure = PurePosixPath(path.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise SkippedError("unsafe path", f"{path!r} leads out of its folder")
