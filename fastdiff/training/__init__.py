"""Training of flow models: rectified flow, minibatch couplings and reflow."""

from __future__ import annotations

from fastdiff.training.couplings import COUPLINGS, couple
from fastdiff.training.rectified_flow import RectifiedFlowModel
from fastdiff.training.reflow import generate_pairs, reflow
from fastdiff.training.trainer import train_rectified_flow

__all__ = ["COUPLINGS", "RectifiedFlowModel", "couple", "generate_pairs", "reflow", "train_rectified_flow"]
