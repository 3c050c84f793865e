"""Our operators inside models that people already have: `accelerate`, `restore`, `acceleration_report`."""

from fastdiff.integrations.accelerate import Report, accelerate, acceleration_report, restore

__all__ = ["Report", "accelerate", "acceleration_report", "restore"]
