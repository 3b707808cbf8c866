"""One formula: written, traced, derived, interpreted, printed."""
