"""Each kind of source gives the documents that its rows say, media in their native bytes."""

import base64
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import LIMIT, MAX_BYTES, TABLE, json_lines, picture, prepared, tar, video

from data_modules.components.corpus import Corpus
from data_modules.sources.captioned_folder import CaptionedFolder
from data_modules.sources.json_lines import JSONLines
from data_modules.sources.readers import Reader
from data_modules.sources.tables import DatasetsFolder, Parquet
from data_modules.sources.web_dataset import WebDataset
from moonlit.chat.messages import MediaFile
from moonlit.chat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.embedded()
DIALOGUE = [
    {"role": "user", "content": [{"image": "a.jpg"}, {"text": "What is it?"}]},
    {"role": "assistant", "content": "a wall"},
]


def texts_of(folder: Path) -> list[str]:
    """Decode every document, runs of placeholders as one."""
    corpus = Corpus({"mine": str(folder)})
    texts = []
    for number in range(len(corpus.index["mine"])):
        ids = corpus.read("mine", number).input_ids.tolist()
        pad = TOKENIZER.special.media_pad_id
        kept = [i for n, i in enumerate(ids) if i != pad or ids[n - 1] != pad]
        texts.append(TOKENIZER.decode(kept))
    return texts


def framed(text: str) -> str:
    return f"[BOS]{text}[EOS]"


def span(kind: str) -> str:
    return f"<|media_begin|>{kind}<|media_content|><|media_pad|><|media_end|>"


IMAGE = span("image") + "\n"


def test_webdataset_pairs_interleaved_documents_and_videos(tmp_path: Path):
    one, two, film = picture(200), picture(90, "PNG"), video()
    parts = [{"image": "0.png"}, {"text": "and then"}, {"image": "1.jpg"}]
    tar(tmp_path / "s-000.tar", {"a/1.jpg": one, "a/1.txt": b"a wall"})
    tar(
        tmp_path / "s-001.tar",
        {
            "b.0.png": two, "b.1.jpg": one, "b.json": json.dumps(parts).encode(),
            "c.mp4": film, "c.txt": b"it grows", "d.txt": b"text alone",
        },
    )  # fmt: skip
    files = str(tmp_path / "s-{000..001}.tar")
    report = prepared(tmp_path / "out", WebDataset(files=files, columns={}, **LIMIT))

    # 9 frames at 4 a second are kept at 2 a second: 4 of them (round half to even), one chunk.
    chunk = "00:00:00.000" + span("video")
    assert texts_of(tmp_path / "out") == [
        framed(f"{IMAGE}a wall"),
        framed(f"{IMAGE}and then{IMAGE}"),
        framed(f"{chunk}it grows"),
        framed("text alone"),
    ]
    corpus = Corpus({"mine": str(tmp_path / "out")})
    media = [corpus.read("mine", number).media for number in range(4)]
    assert [list(m) for m in media[:2]] == [[[one]], [[two], [one]]]
    (stored,) = media[2]
    assert isinstance(stored, MediaFile)
    assert (stored.data, stored.kind) == (film, "video")
    assert report["documents"] == 4
    # 40 x 30 px pad to 56 x 56: 4 tokens, 16 patches; 64 x 48 to 84 x 56: 6 tokens, 4 x 24.
    assert (report["vision_tokens"], report["patches"]) == (3 * 4 + 6, 3 * 16 + 4 * 24)
    assert report["text_tokens"] == sum(map(len, texts_ids(corpus))) - report["vision_tokens"]


def texts_ids(corpus: Corpus) -> list[np.ndarray]:
    return [corpus.read("mine", n).input_ids for n in range(len(corpus.index["mine"]))]


def test_videos_are_decoded_again_as_they_were_counted(tmp_path: Path):
    tar(tmp_path / "a.tar", {"c.mp4": video(23, fps=5), "c.txt": b"x"})
    prepared(tmp_path / "out", WebDataset(files=str(tmp_path / "a.tar"), columns={}, **LIMIT))
    corpus = Corpus({"mine": str(tmp_path / "out")})

    items = corpus.read("mine", 0).patches("c")

    # 23 frames at 5 a second: round(23 * 2 / 5) = 9 are kept: chunks of 4, 4 and 1.
    assert [item.grid_thw[0] for item in items] == [4, 4, 1]
    brightness = [float(item.pixel_values[:1].float().mean()) for item in items]
    # Kept places are 0, 3, 6, 8, | 11, ... | 22; a frame is 20 brighter than the one before.
    assert brightness == pytest.approx([0, 220, 255], abs=5)  # lossy, and saturated at 255


def reader_of(kind: str, folder: Path) -> Reader:
    """The same three rows, written in each way."""
    one = picture(200)
    (folder / "a.jpg").write_bytes(one)
    uri = "data:image/jpeg;base64," + base64.b64encode(one).decode()
    rows = [
        {"parts": [{"text": "see"}, {"image": "a.jpg"}, {"image": uri}]},
        {"messages": DIALOGUE},
        {"text": "text alone"},
    ]
    if kind == "jsonl":
        file = json_lines(folder / "c.jsonl", rows)
        return JSONLines(files=str(file), shard_bytes=64, **TABLE)
    if kind == "parquet":
        columns = {key: [row.get(key) for row in rows] for key in ("parts", "text")}
        columns["messages"] = [json.dumps(row.get("messages")) for row in rows]
        table = pa.table({**columns, "extra": [1, 2, 3]})
        pq.write_table(table, folder / "c.parquet", row_group_size=2)
        return Parquet(files=str(folder / "*.parquet"), **TABLE)
    rows[0]["parts"] = json.dumps(rows[0]["parts"]).replace('"a.jpg"', json.dumps(uri))
    rows[1]["messages"] = json.dumps(DIALOGUE).replace('"a.jpg"', json.dumps(uri))
    columns = {k: [row.get(k) for row in rows] for k in ("parts", "messages", "text")}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(columns)).save_to_disk(folder / "saved")
    return DatasetsFolder(folder=str(folder / "saved"), split="train", columns={}, **LIMIT)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_rows_of_parts_messages_and_text(kind: str, tmp_path: Path):
    report = prepared(tmp_path / "out", reader_of(kind, tmp_path))

    dialogue = (
        f"<|im_user|>user<|im_middle|>{IMAGE}What is it?<|im_end|><|im_assistant|>assistant"
        "<|im_middle|><think></think>a wall<|im_end|>"
    )
    expected = [framed(f"see{IMAGE}{IMAGE}"), dialogue, framed("text alone")]
    assert texts_of(tmp_path / "out") == expected
    assert report["skipped"] == {}
    corpus = Corpus({"mine": str(tmp_path / "out")})
    dialogue_mask = corpus.read("mine", 1).loss_mask
    trained = corpus.read("mine", 1).input_ids[dialogue_mask].tolist()
    assert TOKENIZER.decode(trained) == "a wall<|im_end|>"


def test_a_dataset_s_own_pictures_and_other_column_names(tmp_path: Path):
    features = datasets.Features({"img": datasets.Image(), "fr": datasets.Value("string")})
    rows = {"img": [{"bytes": picture(s), "path": None} for s in (60, 70)], "fr": ["un", "deux"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    reader = DatasetsFolder(
        folder=str(tmp_path / "saved"), split=None, columns={"image": "img", "text": "fr"}, **LIMIT
    )
    prepared(tmp_path / "out", reader)
    assert texts_of(tmp_path / "out") == [framed(f"{IMAGE}un"), framed(f"{IMAGE}deux")]
    assert Corpus({"m": str(tmp_path / "out")}).read("m", 1).media == [[picture(70)]]


def test_a_folder_of_files_with_captions(tmp_path: Path):
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    (photos / "a.jpg").write_bytes(picture(50))
    (photos / "a.txt").write_text("first")
    (photos / "deep" / "b.PNG").write_bytes(picture(50, "PNG"))
    (photos / "c.webp").write_bytes(picture(50, "WEBP"))
    named = {"c.webp": "third", "gone.jpg": "lost", "../a.jpg": "outside"}
    lines = [{"file_name": name, "text": text} for name, text in named.items()]
    json_lines(photos / "metadata.jsonl", [*lines, lines[0] | {"text": "another"}])
    (photos / "d.heic").write_bytes(b"?")
    (photos / "orphan.txt").write_text("of nothing")
    reader = CaptionedFolder(folder=str(photos), files_per_shard=2, **LIMIT)

    report = prepared(tmp_path / "out", reader)

    assert texts_of(tmp_path / "out") == [framed(f"{IMAGE}first"), framed(f"{IMAGE}third")]
    told = {
        "no caption": "b.PNG", "missing medium": "line 2", "unsafe path": "line 3",
        "second caption": "line 4", "unknown kind": "d.heic", "caption without a medium": "orphan",
    }  # fmt: skip
    assert report["skipped"] == dict.fromkeys(told, 1)
    assert all(words in report["examples"][reason][0] for reason, words in told.items())


def test_lines_are_read_once_wherever_shards_are_cut(tmp_path: Path):
    rows = [{"id": n, "text": "x" * (n % 13)} for n in range(40)]
    file = json_lines(tmp_path / "c.jsonl", rows)
    size = file.stat().st_size
    for shard_bytes in (1, 7, 64, size, size + 1):
        reader = JSONLines(files=str(file), shard_bytes=shard_bytes, **TABLE)
        names = [row.name for shard in reader.shards() for row in reader.rows(shard)]
        assert names == [f"{file}, line {n}" for n in range(1, 41)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: WebDataset(files=f"{f}/no-{{0..1}}.tar", columns={}, **LIMIT), "no-0.tar"),
        (lambda f: JSONLines(files=f"{f}/*.jsonl", shard_bytes=1, **TABLE), r"\*\.jsonl"),
        (lambda f: CaptionedFolder(folder=f"{f}/no", files_per_shard=1, **LIMIT), "no folder"),
        (
            lambda f: DatasetsFolder(folder=str(f), split=None, columns={}, **LIMIT),
            "save_to_disk",
        ),
    ],
)
def test_nothing_to_read_is_said_at_once(make, message: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=message):
        make(tmp_path)


def test_the_limit_of_the_tests_is_what_they_say():
    assert len(video()) < MAX_BYTES
