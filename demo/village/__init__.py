"""The demo's made-up world and the oracle that judges answers in it."""
