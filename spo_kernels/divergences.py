"""The names of the divergences of policy and reference, and their `reference.RowOptions.mixture`."""

from __future__ import annotations

from spo_kernels.checks import check_is_number

DIVERGENCES = ("kl", "reverse_kl", "jsd")

# The shares that float32 arithmetic tells from 0 and 1.
_LEAST, _MOST = 1e-6, 1 - 1e-6


def checked_mixture(divergence: str, mixture: float | None) -> float:
    """The mixture that row ops take: 0 for the KL, 1 for the reverse KL, a share between for the JSD."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if divergence != "jsd":
        if mixture is not None:
            raise ValueError(f'mixture needs divergence="jsd", got {mixture} with divergence={divergence!r}')
        return float(divergence == "reverse_kl")
    if mixture is None:
        return 0.5
    check_is_number("mixture", mixture)
    if not _LEAST <= mixture <= _MOST:
        raise ValueError(f"mixture must be between {_LEAST} and 1 - {_LEAST}, got {mixture}")
    return float(mixture)
