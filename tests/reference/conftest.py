"""This folder compares what the program computes with what it did not compute: torch, torchvision, timm, scikit-learn,
Pillow, or a formula written out here.

Sizes and combinations are drawn by hypothesis, the same ones on every machine. They are meant to be odd: most of the
mistakes these tests stand for were on sizes that do not divide, or in two features at once.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "reference",
    derandomize=True,  # a failure is the same for everyone
    database=None,
    deadline=None,  # times say nothing on a busy machine
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("reference")
