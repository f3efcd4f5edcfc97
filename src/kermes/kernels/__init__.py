"""Compiled loops over flat arrays. Nothing here imports kermes outside this folder."""
