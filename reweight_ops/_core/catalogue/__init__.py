"""The catalogue: one record for everything published that the package offers, whatever its kind."""

from .registry import CATALOGUE, KINDS, Entry, find, published

__all__ = ["CATALOGUE", "KINDS", "Entry", "find", "published"]
