"""The staged pipeline: the table of stages, what determines each, and the engine that brings a run up to date."""
