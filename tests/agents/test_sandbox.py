"""What a worker does for honest code: state, outputs, pictures, errors, time-outs, warm workers."""

import asyncio

import pytest
from conftest import LIMITS, Sandbox

from moonlit.agents.sandbox.policy import Limits, Policy
from moonlit.agents.sandbox.pool import Pool, SandboxError
from moonlit.agents.sandbox.worker import CellOutput, Worker


def test_state_outlives_a_call_but_not_a_worker(sandbox: Sandbox):
    first, second = sandbox.run("x = 20", "x + 1")
    (other,) = sandbox.run("x")

    assert (first.text, second.text, second.error) == ("", "21\n", None)
    assert other.error == "NameError: name 'x' is not defined"


def test_an_error_names_the_cells_line_and_no_path_of_the_machine(sandbox: Sandbox):
    (output,) = sandbox.run("import numpy as np\nnp.linalg.inv(np.zeros((2, 2)))")

    assert output.error == "LinAlgError: Singular matrix"
    assert "Cell line 2" in output.text
    assert "site-packages" not in output.text


def test_figures_and_pictures_come_back_in_order(sandbox: Sandbox):
    (output,) = sandbox.run(
        "from PIL import Image\nfrom matplotlib import pyplot as plt\n"
        "display(Image.new('RGB', (3, 2), (1, 2, 3)))\nplt.figure(figsize=(1, 2), dpi=10)\n"
        "plt.show()\nImage.new('L', (5, 4), 9)"
    )

    assert [image.size for image in output.images] == [(3, 2), (5, 4), (10, 20)]
    assert output.images[0].getpixel((2, 1)) == (1, 2, 3)
    assert output.text.splitlines()[0] == "<image of 3 x 2 px>"


def test_a_file_that_was_put_is_there(sandbox: Sandbox):
    async def put_and_read(worker: Worker) -> CellOutput:
        await worker.put("../a.txt", b"words")  # the folder is dropped
        return await worker.run("open('a.txt').read()")

    assert sandbox.with_worker(put_and_read).text == "'words'\n"


def test_output_past_python_is_kept_too(sandbox: Sandbox):
    (output,) = sandbox.run("import os\nprint('above')\nn = os.write(2, b'below')")

    assert output.text == "above\nbelow"


def test_long_output_keeps_its_head_and_its_tail(sandbox: Sandbox):
    (output,) = sandbox.run("for n in range(100_000): print(n)")

    assert output.text.startswith("0\n1\n")
    assert output.text.endswith("99999\n")
    assert "characters left out" in output.text
    assert len(output.text) < LIMITS.output_chars + 100


def test_pictures_are_capped_in_number_and_pixels(sandbox: Sandbox):
    (output,) = sandbox.run(
        "from PIL import Image\nfor n in range(20): display(Image.new('RGB', (3000, 1000)))"
    )

    assert len(output.images) == LIMITS.num_images
    assert all(i.width * i.height <= LIMITS.image_pixels for i in output.images)
    assert "[12 images left out]" in output.text


def test_an_interrupted_call_keeps_the_state(sandbox: Sandbox):
    before, stuck, after = sandbox.run("x = 3", "while True: x = 4", "x", timeout_s=0.5)

    assert before.error is None
    assert stuck.error == "interrupted after 0.5 s; the state is kept"
    assert not stuck.state_lost
    assert after.text == "4\n"


def test_await_at_the_top_of_a_cell_works(sandbox: Sandbox):
    (output,) = sandbox.run("import asyncio\nawait asyncio.sleep(0, 5)")

    assert (output.text, output.error) == ("5\n", None)


def test_code_that_is_too_long_is_answered(sandbox: Sandbox):
    (output,) = sandbox.run("#" * 10_000_000)

    assert output.error == "code of 10000000 characters: want at most 200000"


def test_a_cancelled_call_ends_the_worker(sandbox: Sandbox):
    async def cancel(worker: Worker) -> CellOutput:
        call = asyncio.create_task(worker.run("while True: pass"))
        await asyncio.sleep(0.3)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        return await worker.run("1")

    assert (
        sandbox.with_worker(cancel).error
        == "the call was cancelled; all variables and files are lost"
    )


def test_a_missing_protection_is_named_and_nothing_starts():
    async def start() -> None:
        async with Pool(Policy(use=("seccomp",), limits=LIMITS), num_warm=0):
            pass

    with pytest.raises(SandboxError, match=r"require=\['files', 'processes'\]"):
        asyncio.run(start())


def test_the_report_names_each_layer(sandbox: Sandbox):
    report = sandbox.pool.report

    assert report.protections == {"files": True, "network": True, "processes": True}
    assert {"landlock", "seccomp", "rlimits", "capabilities"} <= report.layers.keys()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"require": ("file",)}, r"require=\['file'\]"),
        ({"use": ("docker",)}, r"use=\['docker'\]"),
        ({"use": (), "allow_processes": True}, "allow_processes"),
    ],
)
def test_a_bad_policy_is_refused(wrong: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        Policy(**wrong)


def test_a_bad_limit_is_refused():
    with pytest.raises(ValueError, match="memory_bytes=0"):
        Limits(memory_bytes=0)
