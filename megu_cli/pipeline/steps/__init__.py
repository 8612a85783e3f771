"""The functions that compute the stages: settings and loaded inputs in, an artifact out."""
