"""Measurements: each module with a `main` runs as a script, from any folder."""
