"""How far an implementation may be from the float64 recurrence, measured the same way for every op."""

import numpy as np


def relative_errors(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], floors: dict[str, float] | None = None
) -> dict[str, float]:
    """Relative L2 error of every array; floors give a least norm to divide by where a reference may cancel to nothing.

    A reference that is exactly zero must be matched by zero; anything else counts as infinite.
    """
    out = {}
    for name, reference in want.items():
        norm = max(float(np.linalg.norm(reference)), (floors or {}).get(name, 0.0))
        difference = np.linalg.norm(got[name] - reference)
        out[name] = float(difference / norm) if norm else float(np.inf if difference else 0.0)
    return out


def outside(errors: dict[str, float], limits: dict[str, float]) -> list[str]:
    """`name error > limit` for everything outside its limit or not finite."""
    return [
        f"{name} {error:.1e} > {limits[name]:.1e}"
        for name, error in errors.items()
        if not (np.isfinite(error) and error <= limits[name])
    ]
