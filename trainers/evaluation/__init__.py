"""How good chat models are: wins, violations, refusals, instructions kept, diversity."""
