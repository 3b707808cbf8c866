"""``make conformance``: other projects' own functions over their options, ours beside them, one line each; what differs, and why that is known."""
