"""The methods of the catalogue. A published method is one function that returns a spec:
``methods.dapo()``.

``trl`` and ``verl`` take the option names of those libraries.

Every module of this folder is imported, and every registered method is an attribute: a
new method is one new file and no other edit.
"""

import importlib
import pkgutil

from .._core.calls.specs import METHODS, method
from .._core.catalogue.registry import published
from .._core.catalogue.search import published_names
from .trl import trl
from .verl import verl

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
# A module may have the name of its method. The attribute is then the method.
globals().update({name: entry.function for name, entry in METHODS.items()})

__all__ = ["METHODS", "method", "published", "trl", "verl"]


__getattr__ = published_names("policy_loss")


def __dir__() -> list[str]:
    return sorted({*__all__, *METHODS})
