"""Augmented pictures: coordinates stay on what they name, and a key draws one result."""

import numpy as np
import pytest
from PIL import Image

from data_modules.components.augmentation import Annotated, Augmentation
from data_modules.tasks.augmented import Augmented
from data_modules.tasks.pictures import Pictures

STRONG = Augmentation(
    brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05, mirror=0.5, smallest_crop=0.5
)


def marked() -> Annotated:
    """White, with a black block on [0.25, 0.5] x [0.5, 0.75] whose places are annotated."""
    pixels = np.full((80, 120, 3), 255, np.uint8)
    pixels[40:60, 30:60] = 0
    corners = [[0.25, 0.5], [0.5, 0.5], [0.5, 0.75], [0.25, 0.75]]
    return Annotated(
        image=Image.fromarray(pixels),
        boxes=[[0.25, 0.5, 0.5, 0.75]],
        points=[[0.375, 0.625]],
        polygons=[corners, corners[:3]],
    )


def black_box(image: Image.Image) -> np.ndarray:
    """Where the block is seen, in [0, 1]."""
    rows, columns = np.nonzero(np.asarray(image.convert("L")) < 100)
    width, height = image.size
    return np.array(
        [
            columns.min() / width,
            rows.min() / height,
            (columns.max() + 1) / width,
            (rows.max() + 1) / height,
        ]
    )


@pytest.mark.parametrize("number", range(12))
def test_boxes_points_and_polygons_stay_on_the_block(number: int):
    after = STRONG(marked(), (0, number, 3))

    assert after.image.size == (120, 80)
    (box,) = after.boxes
    # A crop of half a side doubles a pixel: 2 of 80.
    np.testing.assert_allclose(box, black_box(after.image), atol=2.5 / 80)
    (point,) = after.points
    np.testing.assert_allclose(point, [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], atol=1e-9)
    whole, triangle = (np.array(polygon) for polygon in after.polygons)
    assert (len(whole), len(triangle)) == (4, 3)
    np.testing.assert_allclose(whole.min(0), box[:2], atol=1e-9)
    np.testing.assert_allclose(whole.max(0), box[2:], atol=1e-9)
    np.testing.assert_allclose(triangle, whole[:3], atol=1e-9)


def test_some_are_mirrored_and_some_cropped():
    boxes = [STRONG(marked(), (0, n, 3)).boxes[0] for n in range(12)]
    widths = {round(box[2] - box[0], 3) for box in boxes}
    assert len(widths) > 6
    mirrored = [Augmentation(mirror=1.0)(marked(), (0, n)).boxes[0] for n in range(2)]
    np.testing.assert_allclose(mirrored, [[0.5, 0.5, 0.75, 0.75]] * 2)


def test_a_key_draws_one_result_whatever_was_drawn_before():
    first = STRONG(marked(), (0, 7, 3))
    STRONG(marked(), (0, 8, 3))
    again, other = STRONG(marked(), (0, 7, 3)), STRONG(marked(), (1, 7, 3))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.boxes == again.boxes
    assert first.image.tobytes() != other.image.tobytes()


def test_colours_change_alike_in_all_frames_of_a_clip():
    frames = [Image.new("RGB", (9, 7), (200, 90, 30))] * 3
    one, two, three = STRONG.colours(frames, (0, 1, 2))
    assert one.tobytes() == two.tobytes() == three.tobytes() != frames[0].tobytes()
    assert one.size == (9, 7)


@pytest.mark.parametrize("family", ["boxes", "polygons", "counting"])
def test_tasks_keep_their_answers_true(family: str):
    source = Pictures(seed=0, family=family, picture_side=84, first=0, held_out_family="counting")
    augmented = Augmented(source=source, augmentation=Augmentation(mirror=1.0), seed=4)
    before, after = source("train", 3), augmented("train", 3)
    assert after.prompt[0].parts[1] == before.prompt[0].parts[1]
    if family == "counting":
        assert after.answer == before.answer
        return
    flat = [np.array(task.answer, float).reshape(len(task.answer), -1, 2)
            for task in (before, after)]  # fmt: skip
    np.testing.assert_allclose(np.sort(flat[1][..., 0]), np.sort(1 - flat[0][..., 0]), atol=1e-6)
    np.testing.assert_allclose(flat[1][..., 1], flat[0][..., 1], atol=1e-6)
    assert augmented("held_out", 3) == source("held_out", 3)


@pytest.mark.parametrize("change", [{"hue": 0.6}, {"smallest_crop": 0.0}, {"mirror": 2.0}])
def test_numbers_that_make_no_sense_are_refused(change: dict):
    with pytest.raises(ValueError, match=next(iter(change))):
        Augmentation(**change)
