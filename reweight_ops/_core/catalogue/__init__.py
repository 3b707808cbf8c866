"""The catalogue: one record for every published method that the package offers, of any
kind.
"""

from .registry import CATALOGUE, KINDS, Entry, published
from .search import Hit, entry_of, find

__all__ = ["CATALOGUE", "KINDS", "Entry", "Hit", "entry_of", "find", "published"]
