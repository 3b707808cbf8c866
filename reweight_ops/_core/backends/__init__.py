"""Backends: three primitives each, one contract (:mod:`.base`), one selector
(:mod:`.select`).
"""
