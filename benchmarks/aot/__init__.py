"""What every Triton kernel becomes, without a GPU."""
