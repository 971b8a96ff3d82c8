"""Checked calls into `puna.core._C`, the native engine for CPUs."""
