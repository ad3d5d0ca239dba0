"""Sounds, prepared and read as pictures of their spectra, can be learnt from."""

import base64
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tones import tone

MOONLIT = Path(sys.executable).with_name("moonlit")
PITCHES = {"low": (200, 500), "middle": (900, 1500), "high": (3000, 6000)}  # [Hz]


def uri(file: bytes) -> str:
    """A WAV as a row holds it."""
    return "data:audio/wav;base64," + base64.b64encode(file).decode()


def questions(num: int, seed: int) -> list[dict[str, Any]]:
    """The same question of every tone; no two tones are alike."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        answer = rng.choice(list(PITCHES))
        sound = uri(tone(rng.uniform(*PITCHES[answer]), rng.uniform(0.15, 0.5), rate=16_000))
        asked = [{"audio": sound}, {"text": "Pitch?"}]
        rows.append({
            "messages": [
                {"role": "user", "content": asked}, {"role": "assistant", "content": answer}
            ]
        })  # fmt: skip
    return rows


@pytest.mark.slow
def test_pitches_are_told_apart(tmp_path: Path):
    """Without the sound one answer in three is right."""

    def moonlit(*words: str) -> None:
        done = subprocess.run(
            [MOONLIT, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    texts = [{"text": " ".join(f"word{n * k % 17}" for k in range(12))} for n in range(600)]
    for name, rows in (
        ("tones", questions(600, 0)), ("unheard", questions(96, 1)), ("texts", texts)
    ):  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        moonlit(
            "prepare", "source=jsonl", f"source.reader.files={name}.jsonl",
            f"source.folder=data/{name}", "source.sound=true",
        )  # fmt: skip
    moonlit(
        "train", "data=corpora", "data.row_tokens=512", "data.rows_per_step=2",
        "data.sources={tones: data/tones, unheard: data/unheard, texts: data/texts}",
        "data.held_out=[unheard]", "data.text_mixture={texts: 1}", "data.vision_mixture={tones: 1}",
        "trainer.max_steps=60", "trainer.val_check_interval=60", "run_dir=run",
    )  # fmt: skip

    scores = json.loads((tmp_path / "run/held_out.json").read_text())
    assert scores["held_out/unheard/accuracy"] > 0.9
