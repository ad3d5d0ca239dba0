"""Pictures upright, videos by the rule, sounds as pictures of what is heard."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from files import LIMIT, picture, prepared, tar, video
from PIL import Image
from tones import tone

from data_modules.components import media, sound
from data_modules.components.corpus import Corpus
from data_modules.components.media import parts_of_file
from data_modules.components.sound import HOP, MAX_COLUMNS, NUM_MELS, SAMPLE_RATE
from data_modules.sources.web_dataset import WebDataset
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import MediaFile, Text, VideoChunk
from moonlit.chat.vision_processing import open_image


@pytest.mark.parametrize(
    ("orientation", "dark"),
    [(1, "left"), (2, "right"), (3, "right"), (6, "top"), (8, "bottom")],
)
def test_pictures_are_turned_as_their_exif_says(orientation: int, dark: str, tmp_path: Path):
    image, file = Image.open(io.BytesIO(picture(200))), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif)

    upright = np.asarray(open_image(file.getvalue(), "x").convert("L")).astype(float)

    assert upright.shape == ((30, 40) if orientation < 5 else (40, 30))
    halves = {
        "left": upright[:, :15], "right": upright[:, -15:], "top": upright[:15],
        "bottom": upright[-15:],
    }  # fmt: skip
    assert min(halves, key=lambda side: halves[side].mean()) == dark

    # The corpus counts the upright picture and keeps the file as it came.
    tar(tmp_path / "a.tar", {"a.jpg": file.getvalue(), "a.txt": b"x"})
    prepared(tmp_path / "out", WebDataset(files=str(tmp_path / "a.tar"), columns={}, **LIMIT))
    document = Corpus({"m": str(tmp_path / "out")}).read("m", 0)
    assert document.media == [[file.getvalue()]]
    assert document.patches("m/0")[0].grid_thw == (1, 4, 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_formats_are_kept_as_they_came(kind: str, tmp_path: Path):
    data = picture(70, kind)
    tar(tmp_path / "a.tar", {f"a.{kind.lower()}": data, "a.txt": b"x"})
    prepared(tmp_path / "out", WebDataset(files=str(tmp_path / "a.tar"), columns={}, **LIMIT))
    assert Corpus({"m": str(tmp_path / "out")}).read("m", 0).media == [[data]]


def test_a_video_becomes_chunks_with_timestamps():
    file = MediaFile(video(40, fps=8), "video")
    parts = parts_of_file(file, "film")
    # 40 frames at 8 a second, kept at 2 a second: 10 frames in chunks of 4, 4 and 2.
    assert all(isinstance(part, VideoChunk) and part.file is file for part in parts)
    chunks = [part for part in parts if isinstance(part, VideoChunk)]
    assert [len(chunk.frames) for chunk in chunks] == [4, 4, 2]
    assert [chunk.timestamp_s for chunk in chunks] == [0.0, 2.0, 4.0]
    brightness = [np.asarray(frame).mean() for frame in chunks[0].frames]
    # Places 0, 4, 9, 13 of frames that are 20 brighter each.
    assert brightness == pytest.approx([0, 80, 180, 255], abs=4)


def turned(mp4: bytes) -> bytes:
    """Let the track's header say that the frames are to be turned right, as a phone does."""
    matrix = mp4.index(b"tkhd") + 4 + 40
    quarter = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    return mp4[:matrix] + np.array(quarter, ">i4").tobytes() + mp4[matrix + 36 :]


def test_a_video_is_turned_as_its_track_says():
    """Catches: frames of a phone that was held upright lying on their side."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.full((48, 64, 3), 200, np.uint8)
        pixels[:, :32] = 20
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())

    (chunk,) = parts_of_file(MediaFile(turned(file.getvalue()), "video"), "film")

    assert isinstance(chunk, VideoChunk)
    upright = np.asarray(chunk.frames[0].convert("L")).astype(float)
    assert upright.shape == (64, 48)
    assert upright[:30].mean() < 60 < 150 < upright[34:].mean()  # what was left is above


def test_a_video_that_says_more_frames_than_it_has_is_refused(monkeypatch: pytest.MonkeyPatch):
    data = video(9, fps=4)
    monkeypatch.setattr(media, "checked_length", lambda data, name: (30, 4.0))
    with pytest.raises(ValueError, match="'film' ends before its 30 frames"):
        parts_of_file(MediaFile(data, "video"), "film")


def test_a_video_of_too_many_tokens_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(media, "MAX_VIDEO_TOKENS", 5)
    monkeypatch.setattr(media, "decoded_frames", None)
    with pytest.raises(ValueError, match="'film' would be 6 vision tokens"):
        parts_of_file(MediaFile(video(9, fps=4), "video"), "film")


def test_a_sound_is_pictures_of_its_pitch_with_timestamps():
    seconds = MAX_COLUMNS * HOP / SAMPLE_RATE + 1.0
    peaks = {}
    for frequency in (400.0, 2500.0):
        file = MediaFile(tone(frequency, seconds), "sound")
        first, one, second, two = parts_of_file(file, "tone")
        assert (first, second) == (Text("00:00:00.000"), Text("00:00:10.000"))
        assert isinstance(one, ImagePart)
        assert isinstance(two, ImagePart)
        assert one.file is two.file is file
        assert one.image.size == (MAX_COLUMNS, NUM_MELS)
        assert two.image.size == (51, NUM_MELS)  # 1 s of 20 ms columns, and the one at its end
        loudness = np.asarray(one.image.convert("L")).mean(axis=1)
        peaks[frequency] = int(loudness.argmax())
    assert peaks[2500.0] < peaks[400.0] - 20, "higher tones stand higher"


def test_sounds_are_read_on_request_only_and_their_files_kept(tmp_path: Path):
    data = tone(900.0, 0.5)
    tar(tmp_path / "a.tar", {"a.wav": data, "a.txt": b"a tone", "b.txt": b"text"})
    reader = WebDataset(files=str(tmp_path / "a.tar"), columns={}, **LIMIT)
    assert prepared(tmp_path / "without", reader)["skipped"] == {"sound": 1}

    report = prepared(tmp_path / "with", reader, sound=True)
    document = Corpus({"m": str(tmp_path / "with")}).read("m", 0)
    (stored,) = document.media
    assert isinstance(stored, MediaFile)
    assert (stored.data, stored.kind) == (data, "sound")
    # 26 columns of 112 rows: padded to 28 x 112, 4 tokens.
    assert [item.grid_thw for item in document.patches("m/0")] == [(1, 8, 2)]
    assert report["vision_tokens"] == 4


def with_sound(film: bytes, sound: bytes) -> bytes:
    """Join an MP4's pictures and a WAV's samples in one MP4."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(film), "r") as pictures,
        av.open(io.BytesIO(sound), "r") as heard,
        av.open(file, "w", format="mp4") as out,
    ):
        track = out.add_stream_from_template(pictures.streams.video[0])
        voice = out.add_stream("aac", rate=heard.streams.audio[0].rate)
        for packet in pictures.demux(video=0):
            if packet.dts is not None:
                packet.stream = track
                out.mux(packet)
        for frame in heard.decode(audio=0):
            out.mux(voice.encode(frame))
        out.mux(voice.encode())
    return file.getvalue()


def test_the_sound_of_a_video_follows_its_pictures_on_request(tmp_path: Path):
    film = with_sound(video(9, fps=4), tone(900.0, 2.0))
    tar(tmp_path / "a.tar", {"a.mp4": film, "a.txt": b"a film", "b.mp4": video(), "b.txt": b"mute"})
    reader = WebDataset(files=str(tmp_path / "a.tar"), columns={}, **LIMIT)
    without = prepared(tmp_path / "without", reader)
    report = prepared(tmp_path / "with", reader, sound=True)

    assert without["documents"] == report["documents"] == 2
    corpus = Corpus({"m": str(tmp_path / "with")})
    heard, mute = (corpus.read("m", number) for number in range(2))
    kinds = [
        m.kind for document in (heard, mute) for m in document.media if isinstance(m, MediaFile)
    ]
    assert kinds == ["audiovisual", "video"]
    *_, spectrum = heard.patches("m/0")
    assert len(heard.patches("m/0")) == len(mute.patches("m/1")) + 1
    assert spectrum.grid_thw[1] == NUM_MELS // 14
    assert report["vision_tokens"] == without["vision_tokens"] + spectrum.grid_thw[2] * 2


@pytest.mark.parametrize("data", [b"", b"RIFF", tone(400.0, 0.0), video()])
def test_what_is_no_sound_is_refused_by_name(data: bytes):
    with pytest.raises(ValueError, match="sound 'noise'"):
        parts_of_file(MediaFile(data, "sound"), "noise")


def test_a_sound_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sound, "MAX_SECONDS", 1)
    assert parts_of_file(MediaFile(tone(400.0, 0.9), "sound"), "tone")
    with pytest.raises(ValueError, match="'tone' is longer than 1 s"):
        parts_of_file(MediaFile(tone(400.0, 1.5), "sound"), "tone")
