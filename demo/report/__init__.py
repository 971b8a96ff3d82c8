"""What the demo shows: figures, pages, and the bars that a run has to meet."""
