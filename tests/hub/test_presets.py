"""The presets as releases: their configs, and K2.5's published counts."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from moonlit.chat.special_tokens import SpecialTokens
from moonlit.hub.config import read_shapes, released_config
from moonlit.hub.released_layout import released_tensors
from moonlit.hub.writer import specs_of
from moonlit.models.kimi import Kimi
from moonlit.models.shapes import DecoderShape, EncoderShape

PRESETS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))

FAMILY = {
    "kimi_vl_a3b": "kimi_vl", "moonlight_16b_a3b": "deepseek_v3", "orchestrator": "deepseek_v3"
}  # fmt: skip


def preset_shapes(path: Path) -> tuple[DecoderShape, EncoderShape | None]:
    with initialize_config_dir(version_base="1.3", config_dir=str(path.parents[1])):
        preset = compose("info", overrides=[f"model={path.stem}"]).model
    return instantiate(preset.decoder), instantiate(preset.vision)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_presets_config_describes_it(path: Path, tmp_path: Path):
    decoder, vision = preset_shapes(path)
    config = released_config(
        decoder,
        vision,
        SpecialTokens(decoder.vocab_size - 256),
        family=FAMILY.get(path.stem, "kimi_k25"),
        int4_experts=False,
        dtype=torch.bfloat16,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert read_shapes(tmp_path) == (decoder, vision)


@pytest.mark.slow
def test_k2_5_has_as_many_tensors_and_bytes_as_the_release():
    """The published folder: 208,550 tensors in 554.27 GiB."""
    decoder, vision = preset_shapes(PRESETS[0].with_name("kimi_k2_5.yaml"))
    with torch.device("meta"):
        model = Kimi(decoder=decoder, vision=vision)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    specs = [
        spec
        for tensor in released_tensors(shapes, "kimi_k25")
        for spec in specs_of(tensor, torch.bfloat16, int4_experts=True)
    ]

    assert len(specs) == 208_550
    assert round(sum(spec.num_bytes for spec in specs) / 2**30, 2) == 554.27


def test_the_k2_5_config_holds_the_released_values():
    decoder, vision = preset_shapes(PRESETS[0].with_name("kimi_k2_5.yaml"))
    config = released_config(
        decoder,
        vision,
        SpecialTokens(163584),
        family="kimi_k25",
        int4_experts=True,
        dtype=torch.bfloat16,
    )

    assert (config["bos_token_id"], config["eos_token_id"]) == (163584, 163585)
    assert (config["pad_token_id"], config["media_placeholder_token_id"]) == (163839, 163605)
    released_text = {
        "first_k_dense_replace": 1,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 262144,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 64,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "type": "yarn",
            "factor": 64.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "v_head_dim": 128,
        "vocab_size": 163840,
    }
    text = config["text_config"]
    assert {key: text[key] for key in released_text} == released_text
    released_vision = {
        "mm_hidden_size": 1152,
        "text_hidden_size": 7168,
        "vt_hidden_size": 1152,
        "vt_intermediate_size": 4304,
        "vt_num_attention_heads": 16,
        "vt_num_hidden_layers": 27,
    }
    assert {key: config["vision_config"][key] for key in released_vision} == released_vision
