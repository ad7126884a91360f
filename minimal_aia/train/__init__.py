"""Supervised fine-tuning with the AIA loss, from the laptop lab to Janus-Pro and Emu3."""
