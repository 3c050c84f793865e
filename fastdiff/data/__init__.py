"""Data sets, and the measures by which generated samples are judged."""

from __future__ import annotations

from fastdiff.data.digits import Digits, load_digits
from fastdiff.data.judge import DigitJudge, frechet_distance, train_digit_judge

__all__ = ["DigitJudge", "Digits", "frechet_distance", "load_digits", "train_digit_judge"]
