"""What is bad is left out and counted, or refused by name; everything else is written."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import LIMIT, MAX_BYTES, TABLE, json_lines, picture, prepared, tar, video

from data_modules.components.corpus import Corpus
from data_modules.sources.json_lines import JSONLines
from data_modules.sources.tables import Parquet
from data_modules.sources.web_dataset import WebDataset
from moonlit.chat.tokenizer import Tokenizer

GOOD = {"g.jpg": picture(1), "g.txt": b"good"}


def from_tars(tmp_path: Path, **shards: dict[str, bytes] | bytes) -> dict[str, Any]:
    """Prepare the tars and a good one, which must come through whatever the others hold."""
    for name, members in ({"zz_good": GOOD} | shards).items():
        if isinstance(members, bytes):
            (tmp_path / f"{name}.tar").write_bytes(members)
        else:
            tar(tmp_path / f"{name}.tar", members)
    reader = WebDataset(files=str(tmp_path / "*.tar"), columns={}, **LIMIT)
    return prepared(tmp_path / "out", reader)


def from_lines(tmp_path: Path, rows: list[Any]) -> dict[str, Any]:
    file = json_lines(tmp_path / "c.jsonl", rows)
    return prepared(tmp_path / "out", JSONLines(files=str(file), shard_bytes=60, **TABLE))


def test_a_tar_cut_short_gives_the_rows_before_the_cut(tmp_path: Path):
    members = {f"{n}.{e}": d for n in "abc" for e, d in (("jpg", picture(9)), ("txt", b"text"))}
    whole = tar(tmp_path / "whole", members).read_bytes()
    # 5 of the 6 files are whole: a 512-byte header and padded data each.
    cut = whole[: whole.index(b"c.txt") + 512 + 2]
    report = from_tars(tmp_path, cut=cut)
    assert report["documents"] == 2 + 1
    assert report["skipped"] == {"damaged tar": 1, "incomplete": 1}
    assert "cut.tar: after 6 files" in report["examples"]["damaged tar"][0]


def test_a_file_that_is_no_tar(tmp_path: Path):
    report = from_tars(tmp_path, noise=bytes(range(256)) * 9, empty=b"")
    assert report["documents"] == 1
    assert report["skipped"] == {"damaged tar": 2}


@pytest.mark.parametrize(
    ("reason", "members"),
    [
        ("broken image", {"a.jpg": picture(9)[:300], "a.txt": b"x"}),
        ("broken image", {"a.png": b"no picture", "a.txt": b"x"}),
        ("empty image", {"a.jpg": b"", "a.txt": b"x"}),
        ("empty video", {"a.mp4": b"", "a.txt": b"x"}),
        ("broken video", {"a.mp4": video()[:600], "a.txt": b"x"}),
        ("text is not UTF-8", {"a.jpg": picture(9), "a.txt": "über".encode("latin-1")}),
        ("text is not UTF-8", {"a.jpg": picture(9), "a.json": '{"text": "ü"}'.encode("latin-1")}),
        ("missing key", {"a.jpg": picture(9)}),
        ("missing key", {"a.json": b'{"parts": [{"img": 1}]}'}),
        ("missing medium", {"a.json": b'{"parts": [{"image": "7.jpg"}, {"text": "x"}]}'}),
        ("no JSON", {"a.json": b"{"}),
        ("sound", {"a.wav": b"RIFF", "a.txt": b"x"}),
        ("too many tokens", {"a.png": picture(9, "PNG", (900, 900)), "a.txt": b"x"}),
    ],
)
def test_a_bad_row_is_counted_by_its_reason(reason: str, members: dict[str, bytes], tmp_path: Path):
    report = from_tars(tmp_path, bad={**members, "b.jpg": picture(8), "b.txt": b"behind it"})
    assert report["documents"] == 2
    assert report["skipped"] == {reason: 1}
    assert "bad.tar, a" in report["examples"][reason][0]


def test_a_video_without_a_frame_is_left_out(tmp_path: Path):
    silent = io.BytesIO()
    with av.open(silent, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    report = from_tars(tmp_path, bad={"a.mp4": silent.getvalue(), "a.txt": b"x"})
    assert report["skipped"] == {"broken video": 1}
    assert "has no pictures" in report["examples"]["broken video"][0]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_paths_out_of_a_tar_are_refused(name: str, tmp_path: Path):
    report = from_tars(tmp_path, bad={f"{name}.jpg": picture(9), f"{name}.txt": b"x"})
    assert report["documents"] == 1
    assert report["skipped"] == {"unsafe path": 2}
    assert "evil" in report["examples"]["unsafe path"][0]


def test_links_in_a_tar_are_not_followed(tmp_path: Path):
    with tarfile.open(tmp_path / "bad.tar", "w") as file:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    assert from_tars(tmp_path)["skipped"] == {"link in a tar": 1}


@pytest.mark.parametrize("path", ["../secret.jpg", "/secret.jpg", "out/secret.jpg"])
def test_paths_out_of_the_media_folder_are_refused(path: str, tmp_path: Path):
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "out").symlink_to(tmp_path)
    report = from_lines(inside, [{"parts": [{"image": path}, {"text": "x"}]}, {"text": "good"}])
    assert report["documents"] == 1
    assert report["skipped"] == {"unsafe path": 1}


def test_a_line_is_named_by_its_number(tmp_path: Path):
    rows = [{"text": "one"}, {"txt": "two"}, b"", {"text": "four"}, b"{", {"text": 6}, b"\xff", 8]
    report = from_lines(tmp_path, rows)
    file = tmp_path / "c.jsonl"
    assert report["documents"] == 2
    assert report["examples"]["missing key"][0].startswith(f"{file}, line 2: has ['txt']")
    assert f"{file}, line 5" in report["examples"]["no JSON"][0]
    assert report["examples"]["not a text"] == [f"{file}, line 6: got int"]
    assert f"{file}, line 7" in report["examples"]["text is not UTF-8"][0]
    assert report["examples"]["no JSON object"] == [f"{file}, line 8: got int"]


def test_a_bad_dialogue_is_left_out(tmp_path: Path):
    alone = [{"role": "user", "content": "hello"}]
    roleless = [{"content": "hello"}]
    report = from_lines(tmp_path, [{"messages": alone}, {"messages": roleless}, {"text": "good"}])
    assert report["skipped"] == {"no dialogue": 1, "missing key": 1}
    assert "no assistant message" in report["examples"]["no dialogue"][0]


def test_a_document_too_large_is_passed_over_unread(tmp_path: Path):
    """A sparse line and a sparse file of two gigabytes: they would not fit a worker's memory."""
    path = tmp_path / "c.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        file.seek(2 << 30, io.SEEK_CUR)
        file.write(b'"}\n{"text": "three"}\n')
    reader = JSONLines(files=str(path), shard_bytes=4 << 30, **TABLE)
    (shard,) = reader.shards()
    one, large, three = reader.rows(shard)
    assert (one.name, three.name) == (f"{path}, line 1", f"{path}, line 3")
    assert (large.reason, large.name) == ("too large", f"{path}, line 2")  # pyright: ignore
    assert f"at most {MAX_BYTES:,}" in large.detail  # pyright: ignore[reportAttributeAccessIssue]


def test_a_file_too_large_in_a_tar_is_left_out(tmp_path: Path):
    report = from_tars(tmp_path, bad={"a.jpg": bytes(MAX_BYTES + 1), "a.txt": b"x"})
    assert report["documents"] == 1
    assert report["skipped"] == {"too large": 1, "incomplete": 1}


def test_of_equal_ids_the_first_stays_in_whatever_process(tmp_path: Path):
    rows = [{"id": n % 7, "text": f"text {n} " + "x" * 40} for n in range(21)]
    report = from_lines(tmp_path, rows)
    corpus = Corpus({"mine": str(tmp_path / "out")})
    tokenizer = Tokenizer.embedded()
    kept = [tokenizer.decode(corpus.read("mine", n).input_ids.tolist()) for n in range(7)]
    assert [text.split()[1] for text in kept] == [str(n) for n in range(7)]
    assert report["documents"] == 7
    assert report["skipped"] == {"duplicate id": 14}


def test_an_id_that_comes_back_in_its_own_shard_is_left_out(tmp_path: Path):
    """Catches: ids that are compared with those of other shards alone."""
    file = json_lines(tmp_path / "c.jsonl", [{"id": n % 2, "text": f"text {n}"} for n in range(5)])
    report = prepared(tmp_path / "out", JSONLines(files=str(file), shard_bytes=1 << 20, **TABLE))
    assert report["documents"] == 2
    assert report["skipped"] == {"duplicate id": 3}


def test_a_tar_that_is_gone_is_no_damaged_one(tmp_path: Path):
    """Catches: a source that is written without the files that were listed."""
    path = tar(tmp_path / "a.tar", GOOD)
    reader = WebDataset(files=str(path), columns={}, **LIMIT)
    (shard,) = reader.shards()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.tar"):
        list(reader.rows(shard))


def test_special_tokens_in_a_text_stay_characters(tmp_path: Path):
    text = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|><|im_end|>[EOS]"
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    from_lines(tmp_path, [{"text": text}, {"messages": chat}])
    corpus, tokenizer = Corpus({"mine": str(tmp_path / "out")}), Tokenizer.embedded()
    first, second = (corpus.read("mine", n).input_ids for n in range(2))
    num_base = len(tokenizer.ranks)
    assert (first[1:-1] < num_base).all()
    assert tokenizer.decode(first[1:-1].tolist()) == text
    assert tokenizer.special.media_pad_id not in second
    assert (second == tokenizer.special.im_end_id).sum() == 2
    assert not corpus.index["mine"]["num_vision_tokens"].any()


def test_a_damaged_parquet_file_costs_its_own_rows(tmp_path: Path):
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    good = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(good[:-9])
    reader = Parquet(files=str(tmp_path / "*.parquet"), **TABLE)
    report = prepared(tmp_path / "out", reader)
    assert report["documents"] == 2
    assert report["skipped"] == {"damaged file": 1}
    assert "b.parquet" in report["examples"]["damaged file"][0]


def test_a_source_of_bad_rows_alone_is_refused_with_the_reasons(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no document; left out: \{'missing key': 1\}"):
        from_lines(tmp_path, [{"no": json.dumps(1)}])


def test_keys_that_mean_nothing_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Catches: `img` for `image`, which would silently make pictures texts."""
    rows = [{"img": "a.jpg", "text": "one"}, {"img": "b.jpg", "text": "two", "id": 7}]
    report = from_lines(tmp_path, [*rows, {"text": "three"}])
    assert report["unread"] == {"img": 2}
    told = capfd.readouterr().err
    assert "img (2)" in told
    assert "source.reader.columns={image: img}" in told


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": " "}, "no text"),
        ({"image": "https://example.com/a.jpg", "text": "far"}, "URL"),
    ],
)
def test_what_would_be_an_empty_document_or_a_fetch(
    row: dict[str, str], reason: str, tmp_path: Path
):
    report = from_lines(tmp_path, [row, {"text": "near"}])
    assert (report["documents"], report["skipped"]) == (1, {reason: 1})


def test_a_key_that_comes_back_in_a_tar_is_left_out(tmp_path: Path):
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as out:
        for name in ("a.txt", "b.txt", "a.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            out.addfile(member, io.BytesIO(b"one"))
    report = prepared(tmp_path / "out", WebDataset(files=str(file), columns={}, **LIMIT))
    assert (report["documents"], report["skipped"]) == (2, {"duplicate key in a tar": 1})
