"""Model folders, and the formats of others: read, write, convert."""
