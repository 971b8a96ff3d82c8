"""Losses and log-probabilities of a linear head, without the (N, V) logits."""
