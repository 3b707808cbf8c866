"""Parts of ``trl_addition.py``: the task and its warm start, the runs, the report."""
