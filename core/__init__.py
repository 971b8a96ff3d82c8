"""The engine: config, model, tokenizer, chat format, generation, checkpoints, parallelism."""
