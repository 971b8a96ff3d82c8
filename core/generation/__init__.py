"""Sampling from a model: ids in, answers with log-probs out."""
