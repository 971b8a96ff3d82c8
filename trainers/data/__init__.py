"""What users bring, read and laid out as the batches that training reads."""
