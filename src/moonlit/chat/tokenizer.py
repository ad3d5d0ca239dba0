"""Text to token ids and back, over ``tiktoken``.

A text never becomes a special id: ``<|im_end|>`` typed by a user is ten ordinary bytes or so, not
a turn's end. Special ids are appended by the chat template.

Source: the release's tokenizer (pattern, rank file format, limits on the length of one piece).
"""

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import tiktoken

from moonlit.chat.special_tokens import ALIASES, TOKEN_STRINGS, SpecialTokens
from moonlit.chat.tokenizer_files import tokenizer_config_json, tokenizer_json

NOT_HAN = r"[{}&&[^\p{{Han}}]]"
UPPER = NOT_HAN.format(r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}")
LOWER = NOT_HAN.format(r"\p{Ll}\p{Lm}\p{Lo}\p{M}")
WORD_PREFIX, CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

PRE_TOKENIZATION_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        f"{WORD_PREFIX}{UPPER}*{LOWER}+{CONTRACTION}",
        f"{WORD_PREFIX}{UPPER}+{LOWER}*{CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Pieces that merges never cross: Han runs, words, up to three digits, punctuation, spaces."""

MAX_PIECE_CHARS = 400_000
"""The regular expression engine gives up on longer texts; the release cuts here too."""
MAX_RUN_CHARS = 25_000
"""A run of spaces or of anything else is cut after so many, as in the release."""
RUN_TOO_LONG = re.compile(rf"\s{{{MAX_RUN_CHARS}}}(?=\s)|\S{{{MAX_RUN_CHARS}}}(?=\S)")

RANKS_FILE, CONFIG_FILE, FAST_FILE = "tiktoken.model", "tokenizer_config.json", "tokenizer.json"


class Tokenizer:
    """A byte-level BPE with the release's special tokens behind it."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        check_ranks(ranks)
        self.special = SpecialTokens(len(ranks))
        self._encoding = tiktoken.Encoding(
            name="moonlit",
            pat_str=PRE_TOKENIZATION_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special.string_to_id,
        )
        self.ranks = ranks

    @classmethod
    def embedded(cls) -> "Tokenizer":
        """Return the small vocabulary of the package: 2048 base ranks, 2304 ids in all."""
        file = files("moonlit.chat") / "embedded.tiktoken"
        return cls(parse_ranks(file.read_text(encoding="ascii"), str(file)))

    @classmethod
    def from_folder(cls, folder: Path | str) -> "Tokenizer":
        """Read a tokenizer in the released layout.

        Args:
            folder: holds ``tiktoken.model`` and ``tokenizer_config.json``.

        Raises:
            ValueError: if a file is missing or damaged, or a special token sits at another id.
        """
        ranks_file, config_file = Path(folder) / RANKS_FILE, Path(folder) / CONFIG_FILE
        for file in (ranks_file, config_file):
            if not file.is_file():
                raise ValueError(f"tokenizer folder {folder} has no {file.name}")
        tokenizer = cls(parse_ranks(ranks_file.read_text(encoding="ascii"), str(ranks_file)))
        check_special_tokens(config_file, tokenizer.special)
        return tokenizer

    def save(self, folder: Path | str) -> None:
        """Write the released layout and ``tokenizer.json``; ``transformers`` reads them as is."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_ranks(folder / RANKS_FILE, self.ranks)
        config = tokenizer_config_json(self.special)
        fast = tokenizer_json(self.ranks, self.special, PRE_TOKENIZATION_PATTERN)
        for name, content in ((CONFIG_FILE, config), (FAST_FILE, fast)):
            text = json.dumps(content, ensure_ascii=False, indent=2)
            (folder / name).write_text(text, encoding="utf-8")

    @classmethod
    def named(cls, name: Path | str) -> "Tokenizer":
        """Return the vocabulary that ``tokenizer=`` means: ``embedded``, or one in a folder."""
        return cls.embedded() if name == "embedded" else cls.from_folder(name)

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any rank."""
        sha = hashlib.sha256()
        for token, rank in self.ranks.items():
            sha.update(hashlib.sha256(b"%d" % rank + token).digest())
        return sha.hexdigest()[:16]

    @property
    def vocab_size(self) -> int:
        """Base ranks plus 256."""
        return self._encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Ids of a text, all below ``num_base_ranks``; a lone surrogate becomes U+FFFD."""
        ids: list[int] = []
        for piece in encodable_pieces(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids become their strings, broken UTF-8 becomes U+FFFD."""
        return self._encoding.decode(list(ids), errors="replace")


def encodable_pieces(text: str) -> Iterator[str]:
    """Cut a text where one call of the encoder would fail; nearly always one piece."""
    if len(text) <= MAX_RUN_CHARS:
        yield text
        return
    for start in range(0, len(text), MAX_PIECE_CHARS):
        piece = text[start : start + MAX_PIECE_CHARS]
        cuts = [0, *(run.end() for run in RUN_TOO_LONG.finditer(piece)), len(piece)]
        yield from (piece[left:right] for left, right in itertools.pairwise(cuts))


def parse_ranks(text: str, name: str) -> dict[bytes, int]:
    """Read the released rank format: one ``base64(token) rank`` a line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"{name}, line {number}: got {line!r}, want a base64 token and its rank"
            ) from error
    return ranks


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """Write the released rank format, in order of rank."""
    lines = (
        f"{base64.b64encode(token).decode()} {rank}\n"
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )
    path.write_text("".join(lines), encoding="ascii")


def check_ranks(ranks: dict[bytes, int]) -> None:
    """Refuse a vocabulary with gaps in its ranks or without all 256 single bytes."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ranks of {len(ranks)} tokens are not 0..{len(ranks) - 1}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the vocabulary lacks {len(missing)} single bytes, first {missing[0]}")


def check_special_tokens(config_file: Path, special: SpecialTokens) -> None:
    """Refuse a tokenizer config that names one of our ids, or places one of our strings, otherwise.

    Older releases of the family leave some of these ids unnamed: that is no conflict.
    """
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    ours = {str(special.num_base_ranks + offset): text for offset, text in TOKEN_STRINGS.items()}
    for token_id, entry in config.get("added_tokens_decoder", {}).items():
        content: str = entry["content"]
        got, want = ALIASES.get(content, content), ours.get(token_id)
        unnamed = want is None or got.startswith("<|reserved_")
        if got != want and (got in ours.values() or not unnamed):
            raise ValueError(
                f"{config_file}: id {token_id} is {got!r}, want {want or 'a reserved token'!r}"
            )
