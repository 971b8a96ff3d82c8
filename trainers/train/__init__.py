"""The one training loop, and what every stage shares."""
