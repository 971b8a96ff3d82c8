"""Training and generation beside Puna's peers."""
