"""Inside a vLLM server: takes a trainer's weights over HTTP, layer by layer.

Started with ``--worker-extension-cls moonlit.rl.engines.vllm.worker.WeightReceiver`` and
``--weight-transfer-config '{"backend": "moonlit"}'``; imported nowhere else, for it needs vLLM. Its
environment needs this file and the two empty packages above it on ``PYTHONPATH``, no more of
moonlit.

Source: vLLM 0.32, ``vllm/distributed/weight_transfer`` (its interface for backends of one's own).
"""
# vLLM is in another environment than the one that is checked:
# pyright: reportMissingImports=false

import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

BACKEND = "moonlit"


@dataclass
class NoRendezvous(WeightTransferInitInfo):
    """Nothing is agreed on before an update."""


@dataclass
class WhereWeightsAre(WeightTransferUpdateInfo):
    """Parts of the weights in the released layout, whole modules in each, as safetensors."""

    urls: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


class FetchedWeights(WeightTransferEngine[NoRendezvous, WhereWeightsAre]):
    """A backend that every worker fetches the weights with, from a trainer's HTTP server."""

    init_info_cls = NoRendezvous
    update_info_cls = WhereWeightsAre

    def init_transfer_engine(self, init_info: NoRendezvous) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Let each layer be loaded as when the server started."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: WhereWeightsAre) -> None:
        """Fetch the parts one after another and load them."""
        self.model.load_weights(fetched(update_info))

    def finish_weight_update(self) -> None:
        """Bring the layers into the form that they are computed in."""
        finalize_layerwise_reload(self.model, self.model_config)
        pack_experts_again(self.model)

    def shutdown(self) -> None:
        """Hold nothing."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Refuse: a trainer of ours serves its weights, and sends none."""
        raise NotImplementedError("weights are fetched, not sent")


def fetched(where: WhereWeightsAre) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of all parts."""
    for url in where.urls:
        request = urllib.request.Request(url, headers=where.headers)
        with urllib.request.urlopen(request) as answer:
            part = load(answer.read())
        yield from part.items()


@torch.no_grad()
def pack_experts_again(model: nn.Module) -> None:
    """Pack the routed experts for a CPU's kernel, as vLLM does at the start but not on a reload.

    Left unpacked they answer wrongly behind HTTP 200 (vLLM 0.32).
    """
    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            method: Any = layer.quant_method
            method.moe_kernel.fused_experts.process_weights_after_loading(layer)


class WeightReceiver:
    """Becomes a base of vLLM's worker; what it adds is called through ``/collective_rpc``."""

    def reload_released(self, folder: str, label: str) -> None:
        """Load all weights from a folder in the released layout; ``label`` names them."""
        worker: Any = self
        worker.released_label = None
        worker.reload_weights(weights_path=folder)
        pack_experts_again(worker.get_model())
        worker.released_label = label

    def loaded_label(self) -> str | None:
        """Return the name of what was loaded so; None: nothing was."""
        return getattr(self, "released_label", None)


WeightTransferEngineFactory.register_engine(BACKEND, FetchedWeights)
