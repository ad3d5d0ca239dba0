"""Encoded files to the parts of a document: pictures, videos by the recipe's rule, sounds.

Decoders: Pillow for pictures, PyAV for videos and sounds. torchvision has given up its own.
"""

import io
from collections.abc import Sequence

import av
from PIL import Image

from data_modules.components.sound import sound_parts
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import MediaFile, Text, VideoChunk
from moonlit.chat.vision_processing import (
    MAX_FRAMES_PER_CHUNK,
    RELEASED_LIMITS,
    chunks_of_sampled,
    open_image,
    resize_plan,
    sampled_places,
)

SAMPLE_FPS = 2.0
"""Frames kept of a video [1/s]; the release's."""
MAX_VIDEO_TOKENS = 1 << 20
"""A video of more vision tokens is refused before it is decoded (our default)."""


def parts_of_file(file: MediaFile, name: str) -> Sequence[ImagePart | VideoChunk | Text]:
    """Decode a file into the parts that stand for it in a document; a video's sound comes last.

    Raises:
        ValueError: if it cannot be decoded, naming it.
    """
    if file.kind == "picture":
        return [ImagePart(open_image(file.data, name), file)]
    pictures = [] if file.kind == "sound" else video_parts(file, name)
    return pictures if file.kind == "video" else [*pictures, *sound_parts(file, name)]


def video_parts(file: MediaFile, name: str) -> list[VideoChunk]:
    """Decode a video: frames at ``SAMPLE_FPS``, in chunks of up to four.

    Frames are taken by their place, so a video of varying frame rate is sampled at its mean rate.

    Raises:
        ValueError: if it has no frame, is damaged, or is too large.
    """
    if not file.data:
        raise ValueError(f"video {name!r} has no byte")
    try:
        num_frames, fps = checked_length(file.data, name)
        kept = decoded_frames(file.data, sampled_places(num_frames, fps, SAMPLE_FPS))
    except av.FFmpegError as error:
        raise ValueError(f"video {name!r} ({len(file.data)} bytes): {error}") from error
    if kept is None:
        raise ValueError(f"video {name!r} ends before its {num_frames} frames")
    return chunks_of_sampled(kept, min(SAMPLE_FPS, fps), file=file)


def checked_length(data: bytes, name: str) -> tuple[int, float]:
    """Return the number of frames and their rate [1/s], without decoding any."""
    with av.open(io.BytesIO(data), "r") as container:
        if not container.streams.video:
            raise ValueError(f"video {name!r} has no pictures")
        stream = container.streams.video[0]
        num_frames = sum(1 for packet in container.demux(stream) if packet.size)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if not num_frames or fps <= 0:
            raise ValueError(f"video {name!r} has {num_frames} frames at {fps:g} a second")
        plan = resize_plan(stream.width, stream.height, max_patches=RELEASED_LIMITS.per_frame)
        num_kept = len(sampled_places(num_frames, fps, SAMPLE_FPS))
        num_tokens = -(-num_kept // MAX_FRAMES_PER_CHUNK) * plan.num_tokens
        if num_tokens > MAX_VIDEO_TOKENS:
            raise ValueError(f"video {name!r} would be {num_tokens:,} vision tokens")
        return num_frames, fps


def decoded_frames(data: bytes, places: Sequence[int]) -> list[Image.Image] | None:
    """Decode the frames at some places, upright; None: the video ends before the last of them."""
    wanted, frames = set(places), {}
    with av.open(io.BytesIO(data), "r") as container:
        for place, frame in enumerate(container.decode(video=0)):
            if place in wanted:
                picture = frame.to_image()
                # A phone held upright: the file holds the frames lying down.
                frames[place] = (
                    picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
                )
            if place == places[-1]:
                return [frames[place] for place in places]
    return None
