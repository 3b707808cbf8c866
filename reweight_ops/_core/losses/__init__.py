"""The public ops."""
