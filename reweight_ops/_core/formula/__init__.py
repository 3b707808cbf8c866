"""Formulas: writing, tracing, differentiating, interpreting and printing them."""
