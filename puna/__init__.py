"""Llama 2, the whole paper, from scratch."""
