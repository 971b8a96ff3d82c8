"""The whole of Llama 2, small: a synthetic world, its oracle, the pipeline, the report."""
