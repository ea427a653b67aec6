"""Paired statistics of networks that were trained with the same seeds: t intervals, Holm's correction, equivalence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_NO_SPREAD = 1e-12  # differences of AP that are equal up to rounding


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences between paired samples, with what a t distribution says of it.

    Attributes:
        n: number of pairs
        mean: mean of sample - reference, in their unit
        low: lower end of the confidence interval of the mean
        high: its upper end
        p: of the two-sided paired t test that the mean is 0

    ``low``, ``high`` and ``p`` are None where there is no spread to judge by: one pair, or equal differences.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided paired t tests (TOST) against a margin.

    Attributes:
        margin: largest difference that counts as none, in the unit of the samples
        not_worse_p: p of the test that the mean difference is above -margin (non-inferiority)
        not_better_p: p of the test that it is below +margin
    """

    margin: float
    not_worse_p: float
    not_better_p: float

    @property
    def p(self) -> float:
        """Of the equivalence: the mean difference lies within the margin on both sides."""
        return max(self.not_worse_p, self.not_better_p)


def paired_difference(
    sample: Sequence[float], reference: Sequence[float], *, confidence: float = 0.95
) -> PairedDifference:
    """Compare two samples of which the values at one position belong together, such as APs of the same seed.

    Args:
        sample: [n] finite values
        reference: [n], what they are compared with
        confidence: of the interval, 0..1

    Raises ValueError for samples that are empty, of unlike length or not finite.
    """
    differences = _differences(sample, reference)
    n, mean = len(differences), float(np.mean(differences))
    if not _has_spread(differences):
        return PairedDifference(n, mean)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(confidence)
    return PairedDifference(n, mean, float(low), float(high), float(test.pvalue))


def equivalence(sample: Sequence[float], reference: Sequence[float], *, margin: float = 0.01) -> Equivalence | None:
    """Is the mean of the paired differences within ± ``margin``? (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987.)

    None where there is no spread to judge by: one pair, or equal differences. Raises ValueError as `paired_difference`
    does, and for a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin {margin}: expected a number above 0")
    differences = _differences(sample, reference)
    if not _has_spread(differences):
        return None
    not_worse = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    not_better = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return Equivalence(margin, float(not_worse), float(not_better))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values of a family of tests, step-down (Holm, Scand. J. Statist. 6, 1979), in the order given.

    An adjusted p below 0.05 rejects with a family-wise error rate of 5 %. None (no test) stays None and is not counted.
    """
    tested = sorted((p, position) for position, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, position) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        adjusted[position] = largest
    return adjusted


def _differences(sample: Sequence[float], reference: Sequence[float]) -> np.ndarray:
    if len(sample) != len(reference) or not sample:
        raise ValueError(f"paired samples of {len(sample)} and {len(reference)} values: expected as many, at least one")
    differences = np.asarray(sample, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise ValueError("paired samples: expected finite values; leave out the pairs that have none")
    return differences


def _has_spread(differences: np.ndarray) -> bool:
    return float(np.ptp(differences)) > _NO_SPREAD
