"""`puna reproduce`: the experiments behind the four questions, on the demo's world."""
