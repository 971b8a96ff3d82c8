"""The paper's values, one TOML file a stage, by model size."""
