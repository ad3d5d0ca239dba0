"""What ``moonlit info`` shows: the parts of a model, and what a token of it costs."""

from rich.console import Group
from rich.table import Table

from moonlit.models.accounting import (
    cache_bytes_per_token,
    forward_flops_per_token,
    parameter_counts,
    weight_bytes,
)
from moonlit.models.kimi import Kimi


def cost_tables(model: Kimi, *, seq_len: int) -> Group:
    """Lay out parameters by part, weights by dtype, and the cost of a text token.

    Args:
        model: built on any device; the meta device is enough.
        seq_len: length of the document that attention is counted for [tokens].
    """
    parts = parameter_counts(model)
    table = Table(title="parameters", title_justify="left")
    table.add_column("part")
    for column in ("total", "active per text token"):
        table.add_column(column, justify="right")
    for part in parts:
        table.add_row(part.name, f"{part.total:,}", f"{part.active:,}")
    table.add_section()
    total, active = sum(p.total for p in parts), sum(p.active for p in parts)
    table.add_row("all", f"{total:,}", f"{active:,}", style="bold")

    costs = Table(title="costs", title_justify="left", show_header=False)
    costs.add_column("what")
    costs.add_column("how much", justify="right")
    for dtype, num_bytes in weight_bytes(parts).items():
        costs.add_row(f"weights, {dtype}", f"{num_bytes / 2**30:,.2f} GiB")
    forward = forward_flops_per_token(model, num_positions=seq_len)
    costs.add_row(f"forward, per token of {seq_len:,}", f"{forward / 1e9:,.3f} GFLOP")
    costs.add_row(f"training step, per token of {seq_len:,}", f"{3 * forward / 1e9:,.3f} GFLOP")
    per_token = cache_bytes_per_token(model.decoder_shape)
    costs.add_row("latent cache, per token, bf16", f"{per_token:,} bytes")
    return Group(table, costs)
