"""``make conformance``: functions of other projects with their options, compared with
ours, one line each.

Known differences have a reason.
"""
