"""The engine that runs a call: plans, autograd, custom ops, outputs."""
