"""Runs a call: plan, autograd, custom ops, outputs."""
