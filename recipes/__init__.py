"""The paper's values: one TOML file a stage, a small one a size; the demo's and examples."""
