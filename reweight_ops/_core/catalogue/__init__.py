"""The catalogue: one record for everything published that the package offers, whatever its kind."""

from .registry import CATALOGUE, KINDS, Entry, published
from .search import Hit, entry_of, find

__all__ = ["CATALOGUE", "KINDS", "Entry", "Hit", "entry_of", "find", "published"]
