"""The ``[N]`` vectors of a call: which rows count, and how they group."""
