"""megu: make a trained image classifier forget, guided by a multimodal LLM (MeGU, arXiv:2602.17088)."""

__version__ = "0.1.0"
