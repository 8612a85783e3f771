"""Similarity ratings: one protocol, one file per backend."""
