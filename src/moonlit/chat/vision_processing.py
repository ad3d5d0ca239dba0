"""From pictures and frames to the encoder's patches, as uint8.

Rule: shrink (never grow) until the patch limits hold, resize bicubically, pad with zeros at the
right and the bottom to whole 2 x 2 groups of patches. Padding comes *before* normalisation, so a
padded pixel is -1 for the encoder and a padded patch is an ordinary one. Normalisation itself,
(x / 255 - 0.5) / 0.5, happens on the device.

Source: the release's preprocessor; its limits are the defaults here.
Axes: P patches (frames in order, rows, columns), N items.
"""

import io
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from moonlit.batch import PackedMedia
from moonlit.chat.messages import MediaFile, VideoChunk

PATCH_PX = 14
MERGE = 2
BLOCK_PX = PATCH_PX * MERGE
"""Both sides are padded to a multiple of this: one block is one token."""
MAX_FRAMES_PER_CHUNK = 4
MAX_SIDE_PX = 20_000
"""Pictures with a side of this length or more are refused (our default)."""

DAMAGE = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on damaged files, by format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchLimits:
    """How many patches a picture may cost before it is shrunk."""

    per_image: int = 16384
    per_side: int = 512
    per_frame: int = 4096
    per_video: int | None = None
    """Shared evenly by a video's frames; None: no such limit."""

    def per_frame_of(self, num_frames: int) -> int:
        """Patch limit of each frame of a video of ``num_frames`` sampled frames."""
        if self.per_video is None:
            return self.per_frame
        return max(1, min(round(self.per_video / num_frames), self.per_frame))


RELEASED_LIMITS = PatchLimits()


@dataclass(frozen=True, slots=True)
class ResizePlan:
    """Sizes in pixels: what the picture is resized to, and what it is then padded to."""

    new_width: int
    new_height: int
    padded_width: int
    padded_height: int

    @property
    def num_tokens(self) -> int:
        """Vision tokens of one frame of this size."""
        return (self.padded_width // BLOCK_PX) * (self.padded_height // BLOCK_PX)


@dataclass(slots=True)
class MediaItem:
    """One visual item: an image (t = 1) or a chunk of up to four frames."""

    pixel_values: UInt8[Tensor, "P 3 14 14"]
    grid_thw: tuple[int, int, int]
    """Frames, patch rows, patch columns; their product is P."""

    @property
    def num_tokens(self) -> int:
        """Placeholders it takes in the text: frames are averaged, 2 x 2 patches merged."""
        _, rows, columns = self.grid_thw
        return (rows // MERGE) * (columns // MERGE)


def resize_plan(
    width: int, height: int, *, max_patches: int = 16384, max_side_patches: int = 512
) -> ResizePlan:
    """Apply the release's resize rule to a picture's size.

    scale = min(1, sqrt(max_patches / (max(1, W // 14) max(1, H // 14))), 7168 / W, 7168 / H).

    Raises:
        ValueError: if a side is zero, or ``MAX_SIDE_PX`` or longer.
    """
    if min(width, height) < 1 or max(width, height) >= MAX_SIDE_PX:
        raise ValueError(
            f"picture of {width} x {height} px: sides must be 1 to {MAX_SIDE_PX - 1} px"
        )
    max_side_px = max_side_patches * PATCH_PX
    num_patches = max(1, width // PATCH_PX) * max(1, height // PATCH_PX)
    scale = min(
        1.0, math.sqrt(max_patches / num_patches), max_side_px / width, max_side_px / height
    )
    new_width = min(max(1, int(width * scale)), max_side_px)
    new_height = min(max(1, int(height * scale)), max_side_px)
    return ResizePlan(new_width, new_height, whole_blocks(new_width), whole_blocks(new_height))


def whole_blocks(side_px: int) -> int:
    """Round a side up to whole blocks."""
    return -(-side_px // BLOCK_PX) * BLOCK_PX


def num_vision_tokens(width: int, height: int, *, limits: PatchLimits = RELEASED_LIMITS) -> int:
    """Vision tokens of an image of this size, without touching a pixel."""
    return resize_plan(
        width, height, max_patches=limits.per_image, max_side_patches=limits.per_side
    ).num_tokens


def image_patches(image: Image.Image, *, limits: PatchLimits = RELEASED_LIMITS) -> MediaItem:
    """Cut one picture into patches."""
    plan = resize_plan(*image.size, max_patches=limits.per_image, max_side_patches=limits.per_side)
    return stack_frames([frame_patches(image, plan)], plan)


def chunk_patches(chunk: VideoChunk, *, limits: PatchLimits = RELEASED_LIMITS) -> MediaItem:
    """Cut a chunk's frames into one item's patches, frame after frame.

    Raises:
        ValueError: if there are none or more than four, or they differ in size.
    """
    frames, shared_limit = chunk.frames, chunk.max_frame_patches
    sizes = {frame.size for frame in frames}
    if not 1 <= len(frames) <= MAX_FRAMES_PER_CHUNK or len(sizes) != 1:
        raise ValueError(
            f"video chunk of {len(frames)} frames with sizes {sorted(sizes)}: want 1 to "
            f"{MAX_FRAMES_PER_CHUNK} frames of one size"
        )
    plan = resize_plan(
        *frames[0].size,
        max_patches=limits.per_frame if shared_limit is None else shared_limit,
        max_side_patches=limits.per_side,
    )
    return stack_frames([frame_patches(frame, plan) for frame in frames], plan)


def frame_patches(image: Image.Image, plan: ResizePlan) -> np.ndarray:
    """Resize, pad and cut one picture: uint8 [rows * columns, 3, 14, 14]."""
    rgb = image if image.mode == "RGB" else to_rgb(image)
    if rgb.size != (plan.new_width, plan.new_height):
        rgb = rgb.resize((plan.new_width, plan.new_height), Image.Resampling.BICUBIC)
    pixels = np.asarray(rgb)
    if (plan.padded_height, plan.padded_width) != pixels.shape[:2]:
        padded = np.zeros((plan.padded_height, plan.padded_width, 3), np.uint8)
        padded[: plan.new_height, : plan.new_width] = pixels
        pixels = padded
    rows, columns = plan.padded_height // PATCH_PX, plan.padded_width // PATCH_PX
    cut = pixels.reshape(rows, PATCH_PX, columns, PATCH_PX, 3).transpose(0, 2, 4, 1, 3)
    return cut.reshape(rows * columns, 3, PATCH_PX, PATCH_PX)  # the copy into patch order


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to three 8-bit channels; transparency is dropped, as in the release.

    Differs: 16-bit greys are scaled, where Pillow would clip nearly all of them to white.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"picture of mode {image.mode!r}: want 8 or 16 bits a channel")
    return image.convert("RGB")


def stack_frames(frames: list[np.ndarray], plan: ResizePlan) -> MediaItem:
    """Lay frames end to end."""
    pixel_values = torch.from_numpy(frames[0] if len(frames) == 1 else np.concatenate(frames))
    grid = (len(frames), plan.padded_height // PATCH_PX, plan.padded_width // PATCH_PX)
    return MediaItem(pixel_values, grid)


def video_chunks(
    frames: Sequence[Image.Image],
    fps: float,
    *,
    sample_fps: float = 2.0,
    limits: PatchLimits = RELEASED_LIMITS,
) -> list[VideoChunk]:
    """Sample a video and cut it into chunks of four frames with their timestamps.

    Keeps max(round(n min(sample_fps, fps) / fps), 1) of n frames, evenly spaced from the first to
    the last (our default; the recipe gives the number only). The last chunk may be short. A
    chunk's time is its index * 4 / sampled rate.

    Args:
        frames: all frames of the video, in order.
        fps: their rate [1/s].
        sample_fps: rate to keep [1/s].
        limits: where a limit for the whole video, if any, is shared out to its frames.
    """
    if not frames or not fps > 0 or not sample_fps > 0:
        raise ValueError(
            f"video of {len(frames)} frames, fps={fps}, sample_fps={sample_fps}: all must be > 0"
        )
    kept = [frames[place] for place in sampled_places(len(frames), fps, sample_fps)]
    return chunks_of_sampled(kept, min(sample_fps, fps), limits=limits)


def sampled_places(num_frames: int, fps: float, sample_fps: float) -> list[int]:
    """Places of the frames that are kept of a video, in order."""
    num_kept = max(round(num_frames * min(sample_fps, fps) / fps), 1)
    return np.linspace(0, num_frames - 1, num_kept).round().astype(int).tolist()


def chunks_of_sampled(
    frames: Sequence[Image.Image],
    fps: float,
    *,
    limits: PatchLimits = RELEASED_LIMITS,
    file: MediaFile | None = None,
) -> list[VideoChunk]:
    """Cut the kept frames of a video into chunks with their timestamps.

    Args:
        frames: kept ones, in order.
        fps: their rate [1/s].
        limits: where a limit for the whole video, if any, is shared out to its frames.
        file: the video.
    """
    return [
        VideoChunk(
            frames[start : start + MAX_FRAMES_PER_CHUNK],
            start / fps,
            limits.per_frame_of(len(frames)),
            file,
        )
        for start in range(0, len(frames), MAX_FRAMES_PER_CHUNK)
    ]


def pack_media(items: Sequence[MediaItem]) -> PackedMedia:
    """Lay items end to end; a batch without any holds None instead."""
    if not items:
        raise ValueError("pack_media got no items: a batch without media holds None")
    return PackedMedia(
        pixel_values=torch.cat([item.pixel_values for item in items]),
        grid_thw=torch.tensor([item.grid_thw for item in items]),
    )


def open_image(data: bytes, name: str) -> Image.Image:
    """Decode a whole picture now and turn it upright, as its EXIF orientation says.

    Damage shows here and not in a later step.

    Args:
        data: the encoded file.
        name: what to call it in an error.

    Raises:
        ValueError: if the picture is unreadable, truncated, empty or too large.
    """
    try:
        image = Image.open(io.BytesIO(data))
        resize_plan(*image.size)  # before decoding: a huge header must not cost memory
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"picture {name!r} ({len(data)} bytes): no known format") from error
    except DAMAGE as error:
        raise ValueError(f"picture {name!r} ({len(data)} bytes): {error}") from error
