"""What a user can get wrong in a layer's sizes, said once and the same way everywhere."""

from __future__ import annotations


def require_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raises ValueError, listing what would fit, unless `divisor` is positive and divides `value`."""
    if divisor < 1 or value % divisor:
        choices = ", ".join(str(n) for n in range(1, value + 1) if value % n == 0)
        raise ValueError(f"{divisor_name} {divisor} does not divide {name} {value}; use one of {choices}")
