"""Whole tensors written into parameters that may be cut over ranks."""

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def held_region(parameter: Tensor) -> tuple[slice, ...]:
    """Return where this rank's part of a parameter lies in the whole."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def holds(parameter: Tensor, row: int | None) -> bool:
    """Say whether this rank holds something of one row of a parameter; None: of any."""
    region = held_region(parameter)
    return row is None or region[0].start <= row < region[0].stop


def write(parameter: Tensor, content: Tensor, *, row: int | None = None) -> None:
    """Fill a parameter, or one row of it, with this rank's part of the content.

    Args:
        parameter: whole, or a ``DTensor``.
        content: of the whole parameter, or of the row.
        row: along the parameter's first axis; what lies on another rank is passed over.
    """
    region = held_region(parameter)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if row is not None:
        if not holds(parameter, row):
            return
        local, region = local[row - region[0].start], region[1:]
    local.copy_(content[region])
