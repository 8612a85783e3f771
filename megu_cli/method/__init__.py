"""MeGU (arXiv:2602.17088) in four files: transition, labels, noise, finetune.

Beyond the paper stand beside them: proxy (labels from a small network that never saw the forget set), unseen (labels of
single images without a proxy), adversary (against what features keep), and in finetune the clean samples and the
reassigned labels. `preset: paper` switches these off.

Nothing here knows paths or the terminal: tensors, data splits, modules and sections of the config in, tensors out.
"""
