"""Mamba's selective scan: api.py has the equation, chunked.py the algorithm, reference.py the oracle."""

from pallas_kernels.selective_scan.api import IMPLS, resolve, selective_scan, selective_scan_step

__all__ = ["IMPLS", "resolve", "selective_scan", "selective_scan_step"]
