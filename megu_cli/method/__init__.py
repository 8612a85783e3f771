"""MeGU (arXiv:2602.17088) in four files: transition, labels, noise, finetune.

What is ours stands beside them: unseen (soft labels of single images), adversary (against what features keep), and in
finetune the clean samples and the reassigned labels. `preset: paper` switches these off.

Nothing here knows paths, config objects or the terminal: tensors, data splits and modules in, tensors out.
"""
