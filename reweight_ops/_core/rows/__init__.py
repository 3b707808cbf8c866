"""The ``[N]`` vectors of a call: the rows that count, and how they form groups."""
