"""Backends: three verbs each, one contract (:mod:`.base`), one selector (:mod:`.select`)."""
