"""The benchmarks: ``python -m bench --help``. Cases and providers are data. Nothing is
timed before its results pass a check.
"""
