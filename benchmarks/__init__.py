"""The benchmark suite: Puna beside its peers on the same weights, threads and dtype."""
