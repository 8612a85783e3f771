"""Fuzz suite: hostile inputs of every kind, and what must hold for each of them (docs/security.md)."""
