"""Newton-Schulz against what it does by definition to singular values."""

import pytest
import torch

from moonlit.optim.newton_schulz import newton_schulz, newton_schulz_reference


@pytest.mark.parametrize(("rows", "columns"), [(5, 12), (12, 5), (7, 7)])
def test_it_is_the_polynomial_of_the_singular_values(rows: int, columns: int):
    """Catches: a wrong coefficient, a wrong power, a norm shared by the whole batch."""
    torch.manual_seed(0)
    matrices = (
        torch.randn(3, rows, columns).double() * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    )

    ours = newton_schulz(matrices)

    for matrix, result in zip(matrices, ours, strict=True):
        torch.testing.assert_close(
            result, newton_schulz_reference(matrix), rtol=0, atol=1e-9
        )  # float64, five cubic steps: rounding only


def test_singular_values_end_in_the_band_of_the_coefficients():
    torch.manual_seed(0)
    starts = torch.linspace(0.01, 1.0, 2000).double()  # normalised singular values that occur
    for _ in range(5):
        starts = 3.4445 * starts - 4.7750 * starts**3 + 2.0315 * starts**5
    low, high = starts.min(), starts.max()

    singular_values = torch.linalg.svdvals(newton_schulz(torch.randn(4, 16, 40).double()))

    assert 0.65 < low < high < 1.25
    assert low <= singular_values.min()
    assert singular_values.max() <= high


def test_fp32_errs_no_more_than_torch_does_in_bf16():
    from torch.optim._muon import _zeropower_via_newtonschulz

    torch.manual_seed(0)
    matrix = torch.randn(24, 40)
    truth = newton_schulz_reference(matrix.double())

    ours = (newton_schulz(matrix[None])[0] - truth).abs().max()
    trusted = (
        (_zeropower_via_newtonschulz(matrix.clone(), (3.4445, -4.7750, 2.0315), 5, 1e-7) - truth)
        .abs()
        .max()
    )

    assert ours < 1e-4 < trusted  # fp32 against bf16


def test_a_zero_matrix_stays_zero():
    matrices = torch.stack([torch.zeros(3, 4), torch.eye(3, 4)])

    ours = newton_schulz(matrices)

    assert ours[0].count_nonzero() == 0
    assert ours[1].isfinite().all()


def test_autocast_does_not_coarsen_it():
    torch.manual_seed(0)
    matrices = torch.randn(2, 8, 12)

    with torch.autocast("cpu", torch.bfloat16):
        ours = newton_schulz(matrices)

    assert torch.equal(ours, newton_schulz(matrices))
