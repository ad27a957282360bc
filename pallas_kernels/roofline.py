"""What devices can do: the ceilings that are measured, those of the data sheets, and the least time of given work."""

from typing import NamedTuple


class Peak(NamedTuple):
    """What a device reaches in practice, not its data sheet: dense bf16 FLOP/s and bytes/s of device memory."""

    flops: float
    bandwidth: float

    def least_ms(self, flops: float, moved: float) -> float:
        """The least milliseconds for so many FLOPs and bytes, if arithmetic and memory traffic overlap."""
        return 1e3 * max(flops / self.flops, moved / self.bandwidth)


class Cost(NamedTuple):
    """FLOPs of matrix products, bytes of arguments and results; what is kept in between is each one's own choice."""

    flops: int
    moved: int


# substring of the device kind -> measured on one: a bf16 matmul of 8192^3, a copy counting bytes read and written
PEAKS = {"H100": Peak(790e12, 3.0e12), "H200": Peak(790e12, 4.3e12)}

# the same -> dense bf16 FLOP/s by the vendor's data sheet: what the field divides by for model FLOP utilisation (MFU)
DATA_SHEET_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def peak_of(device: str) -> Peak | None:
    """The measured peaks of a device kind, or None without an entry in PEAKS."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def data_sheet_flops(device: str) -> float | None:
    """The data sheet's bf16 FLOP/s of a device kind, or None without an entry in DATA_SHEET_FLOPS."""
    return next((flops for name, flops in DATA_SHEET_FLOPS.items() if name in device), None)


def floor_ms(cost: dict[str, Cost], device: str) -> dict[str, float] | None:
    """Milliseconds max(FLOPs / peak FLOP/s, bytes / peak bytes/s) of "forward", "backward" and, their sum,
    "forward_backward"; None for a device kind without an entry in PEAKS."""
    peak = peak_of(device)
    if peak is None:
        return None
    floor = {phase: peak.least_ms(*work) for phase, work in cost.items()}
    return floor | {"forward_backward": floor["forward"] + floor["backward"]}
