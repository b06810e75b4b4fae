"""Checkpoints: complete or not there, readable under any layout."""
