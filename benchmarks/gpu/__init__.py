"""All that is checked and measured on a GPU, in order: `make gpu`."""
