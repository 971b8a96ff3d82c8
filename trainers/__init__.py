"""The stages: data, losses, rewards, the one training loop, and one thin file a stage."""
