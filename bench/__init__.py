"""The benchmarks: ``python -m bench --help``. Cases and providers are data; nothing is timed before it was shown to be right."""
