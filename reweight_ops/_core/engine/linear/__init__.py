"""The LM head from hidden states, a few rows of logits at a time."""
