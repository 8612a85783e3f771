"""Classifiers: networks, where they come from by name, their weights in memory and in files, their features."""
