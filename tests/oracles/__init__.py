"""Independent transcriptions of published losses in plain torch, in any float dtype.
Nothing here imports ``reweight_ops``.

All backends of the package share one source for every rule, so their agreement proves
nothing about a formula. These files are the second opinion: :mod:`.trl` and
:mod:`.verl` follow those libraries' code, :mod:`.papers` the papers' equations.
"""
