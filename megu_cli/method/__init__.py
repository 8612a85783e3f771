"""MeGU (arXiv:2602.17088) in four files: transition, labels, noise, finetune.

Nothing here knows paths, config objects or the terminal: tensors, data splits and modules in, tensors out.
"""
