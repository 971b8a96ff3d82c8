"""Comparisons by people, kept in one SQLite file until they are learned from."""
