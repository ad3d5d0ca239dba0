"""Soft F1 under the best one-to-one matching: what grounding and pointing share.

Axes: P predictions, G truths.
"""

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment


def soft_f1(similarity_PG: Float[np.ndarray, "P G"]) -> float:
    r"""F1 where a matched pair counts as much as it is alike.

    $TP = \max_{matching} \sum s_{pg}$, precision $TP / P$, recall $TP / G$, and their harmonic mean
    $2 TP / (P + G)$. A redundant prediction lowers precision and raises nothing.
    Source: the report (arXiv:2602.02276, Sec. 4.4.2) names F1 with soft matches; this form is ours.

    Args:
        similarity_PG: in [0, 1], of at least one truth.
    """
    num_predictions, num_truths = similarity_PG.shape
    rows, columns = linear_sum_assignment(similarity_PG, maximize=True)
    true_positives = float(similarity_PG[rows, columns].sum())
    return 2 * true_positives / (num_predictions + num_truths)
