"""Samplers: small functions that turn noise into data with a trained model."""

from __future__ import annotations

from fastdiff.samplers.flow import sample_flow_euler

__all__ = ["sample_flow_euler"]
