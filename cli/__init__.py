"""The puna command: one small file a group of verbs."""
